"""One of two ranks of test_agreement.py: trains what each scenario gives this rank, and prints how each one ended.

RANK=R WORLD_SIZE=2 LOCAL_RANK=R MASTER_ADDR=... MASTER_PORT=... python disagreeing.py SCENARIOS.json
"""

import json
import os
import sys
from pathlib import Path

import exitkit
from exitkit.files import disk_error
from exitkit.runs import fingerprints, job
from exitkit.training.checkpoint import Checkpoints

rank = int(os.environ["RANK"])
originals = fingerprints.code_digest, Checkpoints.save, job.make_network


def full(self, run, history, **options):
    raise disk_error(self.path, OSError(28, "No space left on device"))


def faults(name):
    """Replace a part of this process by one that behaves as on another machine."""
    fingerprints.code_digest, Checkpoints.save, job.make_network = originals
    if name == "edited code":
        fingerprints.code_digest = lambda method: "edited"
    elif name == "full disk":
        Checkpoints.save = full
    elif name == "other weights":
        job.make_network = lambda recipe, *sizes: originals[2](recipe.with_values(seed=99), *sizes)


ends = []
for scenario in json.loads(Path(sys.argv[1]).read_text()):
    values, out, resume, fault = scenario[rank]
    faults(fault)
    try:
        run = exitkit.train(values, out, resume=resume)
        ends.append(["finished", run.path.name])
    except exitkit.UserError as error:
        ends.append(["refused", str(error)])
print(json.dumps(ends))
