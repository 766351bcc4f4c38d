"""The dashboards there are."""

from jobs.monitoring.faults import FAULTS
from jobs.monitoring.serving import SERVING
from jobs.monitoring.training import TRAINING

DASHBOARDS = (TRAINING, SERVING, FAULTS)
