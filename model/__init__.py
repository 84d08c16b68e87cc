"""The networks and the method."""

from model.build import build_network, build_networks, build_students
from model.cross_teacher import CrossTeacher
from model.load import load_for_prediction, load_trained

__all__ = [
    "CrossTeacher",
    "build_network",
    "build_networks",
    "build_students",
    "load_for_prediction",
    "load_trained",
]
