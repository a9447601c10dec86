"""The Idp: what every function is handed."""

from conftest import opened
from appliance.recovery import describe_keys, rotate_keys


class TestKeys:
    def test_a_ring_that_cannot_be_read_leaves_the_keys_at_work(self, house, tmp_path):
        idp = opened(house)
        idp.ring_versions = {"auth": (None, None), "admin": (None, None)}
        kid = idp.auth_ring.access.kid
        (tmp_path / "token.pem").write_text("nonsense")
        idp.next_ring_check = 0
        assert idp.auth_ring.access.kid == kid
        idp.store.close()

    def test_a_running_server_signs_with_the_next_key_from_the_second_of_its_promotion(self, house):
        """Its file does not change then: the upkeep writes it within a minute."""
        (kid,) = rotate_keys(house, ["auth"], ["ES256"])
        (since,) = (row["since"] for row in describe_keys(house) if row["kid"] == kid)
        at = since + house.key_overlap
        idp = opened(house, lambda: at - 1)
        idp.ring_versions = {"auth": (None, None), "admin": (None, None)}
        assert idp.auth_ring.access.kid != kid
        idp.clock, idp.next_ring_check = lambda: at, 0
        assert idp.auth_ring.access.kid == kid
        idp.store.close()
