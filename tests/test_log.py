"""Log lines and the file they go to."""

import os

import microauthd as m


class TestFile:
    def test_a_file_that_cannot_be_opened_again_closes_nobody_elses(self, tmp_path):
        log = m.Log(m.Options(log_file=str(tmp_path / "sub" / "x.log")))
        (tmp_path / "sub").mkdir()
        log("one")
        os.rename(tmp_path / "sub", tmp_path / "gone")
        log("two")
        held = os.open("/dev/null", os.O_RDONLY)
        for _ in range(3):
            log("three")
        os.fstat(held)
        os.close(held)
        (tmp_path / "sub").mkdir()
        log("four")
        assert "four" in (tmp_path / "sub" / "x.log").read_text()

    def test_it_is_rotated_and_old_ones_are_kept(self, tmp_path):
        handler = m.LogFile(tmp_path / "x.log", max_bytes=200, keep=3)
        for number in range(100):
            handler.handle(m.logging.makeLogRecord({"msg": f"line {number:04d}", "levelno": 20}))
        assert {"x.log", "x.log.1", "x.log.2", "x.log.3"} <= set(os.listdir(tmp_path)) and not (tmp_path / "x.log.4").exists()
        assert "line 0099" in (tmp_path / "x.log").read_text()


class TestLines:
    def test_what_strangers_send_cannot_forge_a_line(self, tmp_path):
        path = tmp_path / "x.log"
        m.Log(m.Options(log_file=str(path)))("refused", peer='1.2.3.4"\n2026 INFO serving', reason="\x1b[2J")
        (line,) = path.read_text().splitlines()
        assert "\x1b" not in line

    def test_knocking_is_limited_and_counted(self, tmp_path):
        path = tmp_path / "x.log"
        log = m.Log(m.Options(log_file=str(path)))
        for _ in range(1000):
            log("refused")
        assert len(path.read_text().splitlines()) <= 2 * m.Log.LINES
        log("worker.died", "error")
        assert "worker.died" in path.read_text()
