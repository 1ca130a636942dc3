.PHONY: checks format test

# $(call in_environment,COMMANDS): "$$python" in them is the Python that scripts/environment.sh finds; PYTHON=... names one.
in_environment = @python=$$(scripts/environment.sh dev,offline dev,offline) && set -ex && $(1)

checks:
	$(call in_environment,"$$python" -m ruff format --check . && "$$python" -m ruff check . && "$$python" -m mypy && PYTHONPATH=. "$$python" -c "from importlinter.cli import lint_imports_command as lint; lint()")

format:
	$(call in_environment,"$$python" -m ruff format . && "$$python" -m ruff check --fix .)

test:
	./run_tests.sh
