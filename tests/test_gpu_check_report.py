"""What scripts/gpu_check_report.py makes of the logs of a GPU check."""

from __future__ import annotations

import pytest
from gpu_check_report import print_table, read_steps

PASSED = '<testsuites><testsuite><testcase classname="Rows" name="a"/></testsuite></testsuites>'


def one_step(folder, name, *, status=0, log="", junit=PASSED):
    (folder / "steps.tsv").write_text(f"{name}\t{status}\t12\n")
    (folder / f"{name}.log").write_text(log)
    if junit:
        (folder / f"{name}.xml").write_text(junit)
    (step,) = read_steps(folder)
    return step


@pytest.mark.parametrize(
    ("log", "key"),
    [
        ("========= ERROR SUMMARY: {} errors", "memory_errors"),
        ("========= RACECHECK SUMMARY: {} hazards displayed ({} errors, 0 warnings)", "hazards"),
    ],
)
@pytest.mark.parametrize("count", [0, 3])
def test_what_the_sanitizer_counted_is_kept_and_decides(tmp_path, log, key, count):
    step = one_step(tmp_path, "ctest-check", log=log.format(count, count))
    assert step[key] == count and step["ok"] is (count == 0)


def test_a_step_without_a_test_that_passed_proves_nothing(tmp_path):
    skipped = '<testsuites><testsuite><testcase name="a"><skipped/></testcase></testsuite></testsuites>'
    assert not one_step(tmp_path, "ctest-racecheck", junit=skipped)["ok"]


def test_the_table_tells_a_timeout_from_a_failure(tmp_path, capsys):
    steps = [one_step(tmp_path, "ctest-racecheck", status=status, junit=None) for status in (124, 99)]
    print_table({"gpu": "", "driver": "", "cuda_runtime": "", "nvcc": "", "passed": False, "steps": steps})
    timed_out, failed = (line for line in capsys.readouterr().out.splitlines() if line.startswith("ctest"))
    assert " TIME " in timed_out and " FAILED " in failed
