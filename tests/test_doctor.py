"""The doctor: healthy here, and able to say what is not."""

from __future__ import annotations

import re
from importlib.metadata import requires

import numpy as np
import pytest

from strokenet import doctor
from strokenet.doctor import examine


def test_this_machine_is_healthy() -> None:
    report = examine()
    assert report.healthy, [check for check in report.checks if not check.passed]
    assert {check.name for check in report.checks} == {"read and write", "resample", "components", "network", "kernels"}
    assert {choice.operator for choice in report.kernels} >= {"resample", "components"}
    assert set(doctor.PACKAGES) < set(report.facts)
    assert [name for name, value in report.facts.items() if value == "not installed"] in ([], ["triton"])


def test_every_package_that_is_asked_for_is_listed() -> None:
    asked = [line for line in requires("strokenet") or [] if "extra ==" not in line or "mri" in line]
    assert len(asked) == 13
    assert set(doctor.PACKAGES) == {re.split("[<>=~! ]", line)[0] for line in asked} | {"triton"}


def test_a_wrong_answer_and_a_crash_are_both_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(*_: object) -> None:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(doctor, "label_components", lambda mask: (mask, np.zeros(3)))
    monkeypatch.setattr(doctor, "resample_operator", crash)
    report = examine()
    found = {check.name: check for check in report.checks}
    assert not report.healthy
    assert not found["components"].passed
    assert found["components"].detail == "2 components, scipy 204"
    assert found["resample"].detail == "RuntimeError: no such kernel"
    assert found["network"].passed


def test_a_wrong_environment_variable_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STROKENET_KERNELS", "fastest")
    report = examine()
    assert not report.healthy
    assert "STROKENET_KERNELS is 'fastest'; allowed: auto, reference" in report.checks[-1].detail


def test_a_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "PACKAGES", ("numpy", "no-such-package"))
    assert examine().facts["no-such-package"] == "not installed"
