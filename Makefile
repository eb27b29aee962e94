PYTHON ?= python3
BIN := .venv/bin
# Shows what it fetches: PyTorch alone takes minutes.
PIP := $(BIN)/pip --disable-pip-version-check
# Two processes, each with whole files of tests; a single test is quicker by plain pytest.
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile

.PHONY: demo check test app test-app battery bench audit

demo: .venv/run
	$(BIN)/python main.py --recipe demo
	@echo "For further commands: source .venv/bin/activate"

# Before every commit: style, types, and the tests that are not marked slow. All of Lightning's are, and it
# takes seconds to import.
check: .venv/dev .venv/app
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(PYTEST) -q -m "not slow" --ignore tests/test_lit.py

test: .venv/dev .venv/app
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(PYTEST)

app: .venv/app
	$(BIN)/python app.py

# In a real browser: CHROMIUM=/path names one; else the system's, else one that Playwright fetches.
test-app: .venv/dev .venv/app
	$(PIP) install --progress-bar on -c constraints.txt playwright axe-playwright-python
	$(BIN)/python -m pytest tests/test_app.py tests/test_served.py tests/browser

battery: .venv/dev
	$(BIN)/python -m tests.battery

bench: .venv/run
	for name in input step overhead host start distributed peers tables; do $(BIN)/python -m benchmarks.$$name || exit 1; done

# pip-audit alone says "no known vulnerabilities" when it could look nothing up: hence --strict.
audit: .venv/dev
	$(PIP) install --progress-bar on pip-audit
	@$(BIN)/pip-audit --strict --disable-pip --no-deps -r constraints.txt > .venv/audit.log 2>&1; \
	code=$$?; cat .venv/audit.log; if grep -q "could not be audited" .venv/audit.log; then \
	echo "Nothing was audited: vulnerabilities cannot be looked up from here."; fi; exit $$code

.venv/run: requirements.txt constraints.txt
	$(PYTHON) -m venv .venv
	@echo "Installing PyTorch and the rest into .venv: a few minutes, 6 GB."
	$(PIP) install --progress-bar on -r requirements.txt -c constraints.txt
	touch $@

.venv/dev: .venv/run requirements-dev.txt
	$(PIP) install --progress-bar on -r requirements-dev.txt -c constraints.txt
	touch $@

.venv/app: .venv/run requirements-app.txt
	$(PIP) install --progress-bar on --no-deps -r requirements-app.txt -c constraints.txt
	touch $@
