"""Free memory, read from folders that look as the kernel's do."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from distllm.engine.host import free_memory

UNLIMITED = 9223372036854771712  # of control groups of the first version


def groups(root: Path, own: str, files: dict[str, str]) -> Path:
    """Writes /proc/self/cgroup, and files below /sys/fs/cgroup; returns the root they lie under."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(own)
    for name, text in files.items():
        path = root / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")
    return root


def limited(folder: str, limit: object, used: int, stat: str = "anon 1\nfile 2") -> dict[str, str]:
    """The files of a control group of the second version."""
    files = {"memory.max": str(limit), "memory.current": str(used), "memory.stat": stat}
    return {f"{folder}/{name}": text for name, text in files.items()}


def limited_v1(folder: str, limit: int, used: int, stat: str = "cache 2\nrss 1") -> dict[str, str]:
    files = {"memory.limit_in_bytes": str(limit), "memory.usage_in_bytes": str(used), "memory.stat": stat}
    return {f"memory/{folder}/{name}": text for name, text in files.items()}


def test_the_page_cache_counts_as_free(tmp_path: Path) -> None:
    stat = "anon 100\nfile 700\ninactive_anon 60\nactive_anon 40\ninactive_file 500\nactive_file 150"
    assert free_memory(groups(tmp_path, "0::/\n", limited(".", 1000, 900, stat))) == 1000 - 900 + 500 + 150


def test_the_page_cache_of_the_first_version_counts_with_that_of_the_groups_below(tmp_path: Path) -> None:
    stat = "cache 7\ninactive_file 1\nactive_file 2\ntotal_inactive_file 300\ntotal_active_file 50"
    own = "9:name=systemd:/other\n4:cpu,memory:/job\n1:cpuset:/else\n0::/\n"
    files = limited_v1(".", UNLIMITED, 5, stat) | limited_v1("job", 1000, 900, stat)
    assert free_memory(groups(tmp_path, own, files)) == 1000 - 900 + 300 + 50


@pytest.mark.parametrize(
    ("limits", "free"),
    [
        (("max", "max", 1000), 1000 - 10),
        (("max", 700, 1000), 700 - 20),
        ((600, 700, 1000), 600 - 30),
        (("max", 700, "max"), 700 - 20),
    ],
)
def test_the_tightest_limit_from_the_own_group_up_to_the_root_holds(
    limits: tuple[object, object, object], free: int, tmp_path: Path
) -> None:
    top, middle, own = limits
    files = limited(".", top, 30) | limited("slice", middle, 20) | limited("slice/job:1", own, 10)
    assert free_memory(groups(tmp_path, "0::/slice/job:1\n", files)) == free


def test_the_limits_of_other_groups_do_not_matter(tmp_path: Path) -> None:
    files = limited("other", 10, 0) | limited("job", 1000, 0) | limited("job/below", 20, 0)
    assert free_memory(groups(tmp_path, "0::/job\n", files)) == 1000


def test_a_container_that_sees_its_own_group_as_the_root_is_limited_by_it(tmp_path: Path) -> None:
    own = "4:memory:/docker/0123\n0::/docker/0123\n"
    assert free_memory(groups(tmp_path, own, limited_v1(".", 1000, 400, "total_inactive_file 100"))) == 700


def test_a_group_that_is_over_its_limit_has_nothing_free(tmp_path: Path) -> None:
    assert free_memory(groups(tmp_path, "0::/\n", limited(".", 1000, 1200))) == 0


def test_a_group_that_does_not_tell_its_page_cache_is_limited_all_the_same(tmp_path: Path) -> None:
    files = limited(".", 1000, 900)
    del files["./memory.stat"]
    assert free_memory(groups(tmp_path, "0::/\n", files)) == 100


@pytest.mark.parametrize("own", [None, "", "0::/job\n", "4:memory:/job\n"])
def test_without_limits_it_is_what_the_host_has_free(
    own: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = psutil.virtual_memory()
    monkeypatch.setattr("psutil.virtual_memory", lambda: host)
    if own is not None:
        groups(tmp_path, own, limited("job", "max", 10) | limited_v1("job", UNLIMITED, 10))
    assert free_memory(tmp_path) == host.available
