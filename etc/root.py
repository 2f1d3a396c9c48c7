"""Put the folder above on the path: imported first, so that the scripts here find its modules from any folder."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
