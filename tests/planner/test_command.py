"""The `plan` command."""

from launch import run, torchrun


def test_plan_command_alone_and_with_bad_arguments():
    import sys

    alone = run([sys.executable, "-m", "commhooks", "plan", "--numel", "1e5"], timeout=60)
    assert "do not compress" in alone.stdout and "100,000 parameters, 1 ranks" in alone.stdout
    bad = run(
        [sys.executable, "-m", "commhooks", "plan", "--model", "torch.nn:ReLU"], timeout=60, check=False
    )
    assert bad.returncode == 2 and "no parameters" in bad.stderr


def test_plan_command_under_torchrun():
    script = "import sys\nfrom commhooks.cli import main\nsys.exit(main(['plan', '--numel', '2e6']))\n"
    done = torchrun(script, 2, timeout=90)
    assert done.stdout.count("added to a step") == 1 and "2,000,000 parameters, 2 ranks" in done.stdout
