"""Metrics: their declaration, their counters in shared memory, their text, and who may read them."""

import dataclasses
import ipaddress
import math
import os
import re

import microauthd as m
import pytest
from conftest import Caller, PASSWORD, in_child

from appliance.base.metrics import (
    ARGON2_QUEUE, COMMIT_SIZE, Counters, FIGURES, HTTP_REFUSALS, History, LOCKOUTS, LOGINS, METRICS, REQUESTS,
    REQUEST_SECONDS, TOKENS, figures_of, show_metrics,
)

# The abbreviated and the derived units of promtool check metrics: client_golang, promlint/validations.
NOT_BASE_UNITS = re.compile(
    "milliseconds?|microseconds?|nanoseconds?|minutes?|hours?|days?|weeks?|bits?|kilobytes?|megabytes?|gigabytes?|"
    "kelvins?|percent|s|ms|us|ns|sec|b|kb|mb|gb|tb|pb|m|h|d"
)
SAMPLE = re.compile(r'([a-zA-Z_][a-zA-Z0-9_]*)(?:\{((?:[a-z_]+="(?:[^"\\\n]|\\["\\n])*",?)*)\})? (\S+)')


def read(text):
    """Return {(name, frozenset of labels): number} of an exposition."""
    found = {}
    for line in text.splitlines():
        if line.startswith("#"):
            assert re.fullmatch(r"# (HELP [a-z_0-9]+ .+|TYPE [a-z_0-9]+ (counter|gauge|histogram)|EOF)", line), line
            continue
        name, labels, number = SAMPLE.fullmatch(line).groups()
        key = name, frozenset(re.findall(r'([a-z_]+)="((?:[^"\\\n]|\\.)*)"', labels or ""))
        assert key not in found, f"{key} is there twice"
        found[key] = float(number)
    return found


def number(text, name, **labels):
    return read(text).get((name, frozenset(labels.items())), 0)


class TestDeclaration:
    """promtool check metrics, and https://prometheus.io/docs/practices/naming/"""

    @pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.name)
    def test_names_and_units_are_as_prometheus_wants_them(self, metric):
        parts = metric.name.split("_")
        assert re.fullmatch("microauthd_[a-z0-9_]+", metric.name) and metric.help.endswith(".")
        assert (parts[-1] == "total") == (metric.kind == "counter")
        assert not [part for part in parts if NOT_BASE_UNITS.fullmatch(part)]
        assert not {"counter", "gauge", "histogram", "summary", "metric"} & set(parts)
        assert parts[-1] not in ("count", "sum", "bucket")
        assert all(re.fullmatch("[a-z_]+", label) and label not in ("le", "quantile") for label in metric.labels)
        assert list(metric.bounds) == sorted(set(metric.bounds)) and bool(metric.bounds) == (metric.kind == "histogram")

    @pytest.mark.parametrize("name", ["alerts.yaml", "grafana.json"])
    def test_the_examples_name_metrics_and_labels_that_exist(self, name):
        text = (m.APPLIANCE / "metrics" / name).read_text("utf-8").replace("\\\"", '"')
        known = {metric.name: metric for metric in METRICS}
        found = re.findall(r'(microauthd_[a-z0-9_]+)(?:\{([^}]*)\})?', text)
        assert len(found) > 9
        for used, selector in found:
            base = re.sub("_(bucket|sum|count)$", "", used)
            metric = known[used if used in known else base]
            assert used in known or metric.kind == "histogram"
            assert set(re.findall("([a-z]+)[=!]", selector)) <= {*metric.labels, "instance"}

    def test_no_two_have_one_name(self):
        assert len({metric.name for metric in METRICS}) == len(METRICS)


class TestCounters:
    """One process adds, every process reads."""

    def test_what_processes_count_is_summed(self):
        counters = Counters(3)
        counters.add(TOKENS, "password", "app")

        def work(slot):
            counters.enter(slot)
            counters.add(TOKENS, "password", "app", by=2)
            counters.add(TOKENS, "password", f"of {slot}")
            counters.observe(COMMIT_SIZE, 7, "group")

        assert in_child(lambda: work(1)) == in_child(lambda: work(2)) == 0
        totals = counters.totals()
        assert totals[TOKENS.name, ("password", "app")] == [5]
        assert totals[TOKENS.name, ("password", "of 1")] == totals[TOKENS.name, ("password", "of 2")] == [1]
        assert totals[COMMIT_SIZE.name, ("group",)][-1] == 14

    def test_a_process_goes_on_with_the_numbers_of_the_one_that_it_replaces(self):
        counters = Counters(2)

        def work():
            counters.enter(1)
            counters.add(LOGINS, "success")
            counters.add(ARGON2_QUEUE)  # under way when the process is killed
            os.kill(os.getpid(), 9)

        for _ in range(2):
            in_child(work)
        assert counters.totals()[LOGINS.name, ("success",)] == [2]
        assert counters.totals()[ARGON2_QUEUE.name, ()] == [1]
        counters.enter(1)
        assert counters.totals()[ARGON2_QUEUE.name, ()] == [0]

    def test_a_process_that_dies_while_it_adds_a_series_keeps_nobody_waiting(self, monkeypatch):
        counters = Counters(2)

        def work():
            monkeypatch.setattr(Counters, "add_entry", lambda *_: os.kill(os.getpid(), 9))
            counters.enter(1)
            counters.add(LOGINS, "success")

        in_child(work)
        counters.add(LOGINS, "success")
        assert counters.totals()[LOGINS.name, ("success",)] == [1]

    def test_two_hundred_clients_have_a_name_and_the_rest_is_other(self):
        counters = Counters(2)

        def work():
            counters.enter(1)
            for client in range(100, 250):
                counters.add(TOKENS, "password", f"c{client}")

        for client in range(150):
            counters.add(TOKENS, "password", f"c{client}")
        assert in_child(work) == 0
        counters.add(TOKENS, "client_credentials", "c3")
        counters.add(TOKENS, "client_credentials", "c249")
        totals = {key[1]: value for key, value in counters.totals().items() if key[0] == TOKENS.name}
        assert len({client for _, client in totals}) == 201
        assert totals["password", "other"] == [50] and totals["password", "c120"] == [2]
        assert totals["client_credentials", "c3"] == totals["client_credentials", "other"] == [1]

    def test_a_full_directory_loses_what_is_new_and_keeps_what_is_there(self, monkeypatch):
        monkeypatch.setattr(Counters, "SIZE", 20)
        counters = Counters()
        for _ in range(2):
            for status in range(30):
                counters.add(HTTP_REFUSALS, "auth", str(status))
            counters.count_request("auth", "/token", "POST", 200, 0.1)
        assert len(counters.totals()) == 20 and set(map(tuple, counters.totals().values())) == {(2.0,)}

    def test_a_name_of_any_length_and_content_is_one_series(self):
        counters = Counters()
        for name in ('a"b\\c\nd', "é" * 400, "x\0y"):
            counters.add(TOKENS, "password", name)
            counters.add(TOKENS, "password", name)
        text = show_metrics(counters.totals())
        assert sorted(read(text).values()) == [2, 2, 2]
        assert '{grant="password",client="a\\"b\\\\c\\nd"} 2' in text

    def test_a_gauge_can_be_removed(self):
        counters = Counters()
        gauge = METRICS[-1]
        counters.set(gauge, 1, "1", "3")
        counters.set(gauge, math.nan, "1", "3")
        assert counters.totals() == {}


class TestExposition:
    """Prometheus text format 0.0.4, OpenMetrics 1.0"""

    def test_the_buckets_of_a_histogram_include_those_before(self):
        counters = Counters()
        for seconds in (0.001, 0.0011, 0.3, 99):
            counters.observe(REQUEST_SECONDS, seconds, "auth", "/token")
        found, route = show_metrics(counters.totals()), {"server": "auth", "route": "/token"}
        name = REQUEST_SECONDS.name
        assert [number(found, f"{name}_bucket", le=le, **route) for le in ("0.001", "0.0025", "0.25", "0.5", "10.0")] == [
            1, 2, 2, 3, 3,
        ]
        assert number(found, f"{name}_bucket", le="+Inf", **route) == number(found, f"{name}_count", **route) == 4
        assert number(found, f"{name}_sum", **route) == pytest.approx(99.3021)

    def test_a_counter_of_openmetrics_has_its_suffix_at_the_sample_alone(self):
        counters = Counters()
        counters.add(LOGINS, "success")
        lines = show_metrics(counters.totals(), openmetrics=True).splitlines()
        assert "# TYPE microauthd_logins counter" in lines and 'microauthd_logins_total{outcome="success"} 1' in lines
        assert lines[-1] == "# EOF"

    def test_without_the_names_of_clients_their_numbers_are_one(self):
        counters = Counters()
        for client in ("a", "b"):
            counters.add(TOKENS, "password", client, by=2)
        assert 'microauthd_tokens_issued_total{grant="password"} 4\n' in show_metrics(counters.totals(), client_names=False)


class TestCounting:
    """What a request adds."""

    @staticmethod
    def metrics(idp):
        return show_metrics(idp.counters.totals())

    def test_a_request_counts_by_the_template_of_its_route(self, idp, auth, admin, admin_token):
        for path in ("/users/nobody", "/users/nobody-else"):
            assert admin.get(path, bearer=admin_token).status == 404
        auth("HEAD", "/ping")
        found = self.metrics(idp)
        assert number(found, REQUESTS.name, server="admin", route="/users/<id>", method="GET", status="404") == 2
        assert number(found, REQUESTS.name, server="auth", route="/ping", method="HEAD", status="200") == 1
        assert "nobody" not in found

    def test_what_a_stranger_makes_up_is_no_label(self, idp, auth, admin):
        for number_ in range(5):
            auth("GET", f"/made-up-{number_}")
            auth(f"MADEUP{number_}", "/token")
            admin("GET", "/users", headers=[("Host", f"made-up-{number_}.example")])
        found = self.metrics(idp)
        assert not re.search("made-?up", found, re.I)
        assert number(found, REQUESTS.name, server="auth", route="none", method="GET", status="404") == 5
        assert number(found, REQUESTS.name, server="auth", route="none", method="other", status="405") == 5
        assert number(found, REQUESTS.name, server="admin", route="none", method="GET", status="421") == 5

    def test_a_token_counts_by_grant_and_client_and_a_refusal_does_not(self, idp, auth, new_client):
        client = new_client("service")
        for form in ({}, {}, {"scope": "unheard-of"}):
            auth.post("/token", {"grant_type": "client_credentials"} | form, auth=client)
        assert number(self.metrics(idp), TOKENS.name, grant="client_credentials", client="service") == 2

    @pytest.mark.parametrize(
        "name, password, outcome",
        [
            ("ann", PASSWORD, "success"), ("ann", "wrong horse", "wrong_password"), ("bob", PASSWORD, "unknown_user"),
            ("off", PASSWORD, "inactive"),
        ],
    )
    def test_a_login_counts_by_its_outcome(self, idp, auth, new_client, new_user, name, password, outcome):
        new_user("ann")
        idp.store.set_account_active(new_user("off").id, 0, idp.now())
        client = new_client("desk", grant_types=["password"])
        auth.post("/token", {"grant_type": "password", "username": name, "password": password}, auth=client)
        found = read(self.metrics(idp))
        assert {key: value for key, value in found.items() if key[0] == LOGINS.name} == {
            (LOGINS.name, frozenset({("outcome", outcome)})): 1
        }

    def test_a_lockout_counts_once(self, idp, auth, new_client, new_user):
        new_user("ann")
        client = new_client("desk", grant_types=["password"])
        for _ in range(8):
            auth.post("/token", {"grant_type": "password", "username": "ann", "password": "wrong"}, auth=client)
        found = self.metrics(idp)
        assert number(found, LOCKOUTS.name, kind="account") == 1
        assert number(found, LOGINS.name, outcome="locked") == 3


SCRAPER = (ipaddress.ip_network("192.0.2.0/24"),)


class TestAccess:
    """An administrator, a client with the scope, or an address that connects itself."""

    @pytest.mark.parametrize(
        "peer, more, status",
        [
            ("192.0.2.7", {}, 200), ("198.51.100.7", {}, 401),
            ("192.0.2.7", {"microauthd.proxied": True}, 401),  # a proxy there may speak for anybody
            ("192.0.2.7", {"microauthd.socket": "198.51.100.7"}, 401),  # a forwarded address
            ("unix:uid=1000", {"microauthd.uid": 1000}, 401),
        ],
    )
    def test_an_address_counts_if_it_has_connected_itself(self, make_idp, options, peer, more, status):
        idp = make_idp(dataclasses.replace(options, metrics_allow=SCRAPER, metrics_on_auth=True))
        for routes, host in ((m.ADMIN, "localhost:9041"), (m.AUTH, "localhost:9040")):
            answer = Caller(m.App(idp, routes), host).get("/metrics", peer=peer, more_environ=more)
            assert answer.status == status, routes.name

    def test_no_address_is_allowed_unless_an_option_names_it(self, make_idp, options, admin, auth):
        assert admin.get("/metrics", peer="127.0.0.1").status == auth.get("/metrics", peer="127.0.0.1").status == 401
        idp = make_idp(dataclasses.replace(options, metrics_on_auth=False, metrics_allow=SCRAPER))
        assert Caller(m.App(idp, m.AUTH)).get("/metrics").status == 404

    def test_an_administrator_reads_them_with_what_is_true_at_the_moment(self, idp, admin, admin_token):
        answer = admin.get("/metrics", bearer=admin_token)
        assert answer.status == 200 and answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
        text = answer.body.decode()
        assert number(text, TOKENS.name, grant="admin", client="mad:admin") == 1
        assert number(text, "microauthd_database_size_bytes") == os.stat(idp.store.path).st_size
        assert number(text, "microauthd_database_writable") == 1
        assert number(text, "microauthd_signing_key_age_seconds", server="auth", alg="ES256", state="active") > 0
        asked = admin.get("/metrics", bearer=admin_token, headers=[("Accept", "application/openmetrics-text;version=1.0.0")])
        assert asked.headers["content-type"].startswith("application/openmetrics-text") and asked.body.endswith(b"# EOF\n")

    def test_a_client_needs_the_scope_and_still_has_to_have_it(self, idp, auth, admin, new_client):
        def read_as(client):
            token = auth.post("/token", {"grant_type": "client_credentials"}, auth=client).json["access_token"]
            return admin.get("/metrics", bearer=token), token

        assert read_as(new_client("service"))[0].status == 403
        client = new_client("prometheus", scopes=["admin:read_metrics"])
        answer, token = read_as(client)
        assert answer.status == 200 and b"prometheus" in answer.body
        m.remove_scope(idp, m.LOCAL.acting_as("t"), m.get_client(idp, "prometheus"), "admin:read_metrics")
        assert admin.get("/metrics", bearer=token).status == 403

    def test_on_auth_no_client_has_a_name(self, make_idp, options, new_client):
        idp = make_idp(dataclasses.replace(options, metrics_on_auth=True))
        auth, client = Caller(m.App(idp, m.AUTH)), new_client("prometheus", scopes=["admin:read_metrics"])
        token = auth.post("/token", {"grant_type": "client_credentials"}, auth=client).json["access_token"]
        answer = auth.get("/metrics", bearer=token)
        assert answer.status == 200 and b"prometheus" not in answer.body
        assert b'microauthd_tokens_issued_total{grant="client_credentials"} 1\n' in answer.body

    def test_a_token_of_a_user_with_few_scopes_reads_nothing(self, auth, admin, new_client, new_user):
        client = new_client("desk", scopes=["admin:read_metrics", "api:read"])
        new_user("ann", ["api:read"])
        form = {"grant_type": "password", "username": "ann", "password": PASSWORD}
        token = auth.post("/token", form, auth=client).json["access_token"]
        assert admin.get("/metrics", bearer=token).status == 403


class TestHistory:
    """Figures over time: a gap is null, never 0."""

    AT = 1_800_000_000 // 600 * 600

    def noted(self, history, *minutes):
        """Note one token more at the end of each of these minutes, counted from AT."""
        for minute in minutes:
            self.total = getattr(self, "total", 0) + 1
            history.note(self.AT + 60 * minute + 0.5, [self.total] * len(FIGURES))

    def read(self, history, minute, name):
        begin, step, series = history.read(self.AT + 60 * minute + 1, name, ["tokens"])
        return begin, step, series["tokens"]

    def test_a_minute_has_its_increase_and_what_nobody_noted_is_a_gap(self):
        history = History()
        self.noted(history, 1, 2, 3, 6, 7)
        begin, step, points = self.read(history, 7, "1h")
        assert (begin, step, len(points)) == (self.AT + 60 * 7 - 3600, 60, 60)
        assert points[-7:] == [None, 1, 1, None, None, None, 1] and set(points[:-7]) == {None}

    def test_a_day_has_minutes_and_a_week_ten_of_them(self):
        history = History()
        self.noted(history, *range(1, 26))
        begin, step, points = self.read(history, 25, "1d")
        assert (step, len(points), points[-25:]) == (60, 1440, [None] + [1] * 24)
        begin, step, points = self.read(history, 25, "7d")
        assert (step, len(points), points[-4:]) == (600, 1008, [None, 9, 10, 5])
        assert begin + 600 * 1008 == self.AT + 1800

    def test_a_turn_of_the_ring_leaves_nothing_of_the_one_before(self):
        history = History()
        self.noted(history, 1, 2, 1440, 1441)
        assert [point for point in self.read(history, 1441, "1d")[2] if point is not None] == [1, 1]
        self.noted(history, 3000)
        assert set(self.read(history, 3000, "1d")[2]) == {None}

    def test_it_survives_the_process_that_notes(self):
        history = History()
        self.noted(history, 1)
        assert in_child(lambda: history.note(self.AT + 120, [9] * len(FIGURES))) == 0
        self.total = 9
        self.noted(history, 3)
        assert self.read(history, 3, "1h")[2][-3:] == [None, 8, 1]

    def test_figures_are_made_of_the_counters(self):
        counters = Counters()
        for outcome in ("success", "wrong_password", "locked"):
            counters.add(LOGINS, outcome)
        counters.add(TOKENS, "password", "a", by=3)
        counters.add(LOCKOUTS, "account")
        counters.count_request("auth", "/token", "POST", 200, 0.1)
        assert dict(zip(FIGURES, figures_of(counters.totals()), strict=True)) == {
            "requests": 1, "tokens": 3, "logins": 1, "failures": 2, "lockouts": 1,
        }

    def test_the_route_tells_them(self, idp, clock, call):
        totals = figures_of(idp.counters.totals())
        idp.history.note(idp.clock() - 60, totals)
        idp.history.note(idp.clock(), [total + 5 for total in totals])
        found = call("GET", "/status/history?series=tokens,failures&range=1h").json
        assert found["step"] == 60 and sorted(found["series"]) == ["failures", "tokens"]
        assert found["series"]["tokens"][-2:] == [None, 5] and found["from"].endswith("Z")
        assert sorted(call("GET", "/status/history").json["series"]) == sorted(FIGURES)

    @pytest.mark.parametrize("query, member", [("series=", "series"), ("series=tokens,x", "series"), ("range=2h", "range")])
    def test_what_there_is_not_is_refused(self, call, query, member):
        answer = call("GET", f"/status/history?{query}")
        assert answer.status == 400 and list(answer.json["errors"]) == [member]
