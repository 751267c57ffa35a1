"""Every transformer of `tiny_transformers.py` as a module of one's own: export, and the steps that the graphs stand for."""

from pathlib import Path

import pytest
import torch

from fora_trt.bundle import Bundle
from fora_trt.evaluate.export_check import GraphCheck
from fora_trt.export.split import steps_of_module
from fora_trt.export.statistics import graph_statistics
from fora_trt.export.write import bundle_from_model
from fora_trt.models.examples import example_inputs
from fora_trt.models.sites import find_sites
from fora_trt.models.sources import model_from_source
from tests.tiny_transformers import TRANSFORMERS
