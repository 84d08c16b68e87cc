"""The networks and the method."""

from model.build import build_network, build_networks, build_students
from model.cross_teacher import CrossTeacher

__all__ = ["CrossTeacher", "build_network", "build_networks", "build_students"]
