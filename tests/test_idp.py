"""The Idp: what every function is handed."""

from conftest import opened


class TestKeys:
    def test_a_ring_that_cannot_be_read_leaves_the_keys_at_work(self, house, tmp_path):
        idp = opened(house)
        idp.ring_versions = {"auth": (None, None), "admin": (None, None)}
        kid = idp.auth_ring.access.kid
        (tmp_path / "token.pem").write_text("nonsense")
        idp.next_ring_check = 0
        assert idp.auth_ring.access.kid == kid
        idp.store.close()
