"""`python -m tutelage.components.finalize JSON`, where JSON is the stage's configuration."""

import json
import sys

from tutelage.components.finalize.stage import Config, run

print(run(Config.build(json.loads(sys.argv[1] if len(sys.argv) > 1 else "{}"))).model_dump_json(indent=1))
