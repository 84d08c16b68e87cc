"""Train DeepLabv3+ with Cross Teacher Training: python3 'cross_teacher_deeplabv3+.py' --config CONFIG --name NAME."""

from cross_teacher_contr import main
from utils.errors import run_script

if __name__ == "__main__":
    run_script(lambda: main("DeepLabv3+"))
