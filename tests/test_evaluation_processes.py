"""Evaluation by one or many processes, killed and resumed: the same files, no image made twice."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, tiny_config
from runs import fork, in_child, in_processes
from tiny_sd import write_tiny_sd

from sfumato.config import DraftConfig, ModelConfig, SamplerConfig, TrainConfig, TrainingConfig
from sfumato.evaluation import making
from sfumato.evaluation.evaluate import evaluate, scaled
from sfumato.evaluation.results import Variant, read_evaluations, read_variants
from sfumato.evaluation.study import Study
from sfumato.models.registry import load_model
from sfumato.rewards.simple import ColorReward
from sfumato.training.checkpoint import Snapshot, write_checkpoint
from sfumato.training.distribution import ALONE, Distribution, Group
from sfumato.training.folder import RunFolder

PROMPTS = ["a star", "a red ring", "a cube"]
