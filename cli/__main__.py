"""``python -m actvar_convert_cli``: the same as ``actvar``."""

from .main import main

main()
