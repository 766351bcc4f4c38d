"""Schemas of what Kubernetes and its operators take."""

import os
import pathlib

import pytest

from tests.conftest import ROOT
from tests.k8s.schemas import Schemas


@pytest.fixture(scope="session")
def schemas() -> Schemas:
    """CRDs are no part of the project; Kubernetes' own kinds are judged without them."""
    named = os.environ.get("GRSTREAM_TEST_ASSETS")
    crds = (pathlib.Path(named) if named else ROOT.parent / "shared") / "crds"
    return Schemas(crds if crds.is_dir() else None)
