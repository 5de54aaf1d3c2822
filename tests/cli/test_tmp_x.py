import sys; sys.path.insert(0,"/work/main/tests/cli"); sys.path.insert(0,"/work/main/tests")
from test_cli_real import *
from conftest import *
def test_x(directory, invoke):
    r=invoke("generate","Hello","--model",directory,*QUICK); print(repr(r.stdout), r.stderr)
    r=invoke("generate","Hello","--model",directory,*QUICK,"--mode","autoregressive"); print(repr(r.stdout))
