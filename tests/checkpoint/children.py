"""Programs of `programs/`, run as processes of their own."""

import os
import subprocess
import sys

import jaxft.errors

PROGRAMS = os.path.join(os.path.dirname(__file__), "programs")


def run(name, *args, flags=""):
    root = os.path.dirname(os.path.dirname(jaxft.errors.__file__))
    env = dict(os.environ, JAX_PLATFORMS="cpu", XLA_FLAGS=flags, OMP_NUM_THREADS="1", PYTHONPATH=root)
    command = [sys.executable, os.path.join(PROGRAMS, name), *map(str, args)]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def until(child, word):
    for line in child.stdout:  # Gloo, too, speaks on standard output
        if line.strip() == word:
            return
    raise AssertionError(child.communicate()[1][-2000:])


def ended(child):
    try:
        out, err = child.communicate(timeout=120)
    finally:
        child.kill()
    assert child.returncode == 0, err[-2000:]
    return out.strip().splitlines()
