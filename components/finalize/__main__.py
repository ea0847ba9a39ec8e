"""`python -m tutelage.components.finalize JSON`, where JSON is the stage's configuration."""

import argparse
import json
import sys

from tutelage.components.core.errors import TutelageError
from tutelage.components.finalize.stage import Config, run

parser = argparse.ArgumentParser(prog="python -m tutelage.components.finalize", description="Ends a run.")
parser.add_argument("config", nargs="?", default="{}", help="the stage's configuration, as JSON")
try:
    result = run(Config.build(json.loads(parser.parse_args().config)))
except (TutelageError, ValueError) as error:
    sys.exit(f"finalize: {error}")
print(result.model_dump_json(indent=1))
