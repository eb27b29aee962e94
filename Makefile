PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test app test-app battery bench audit

demo: .venv/run
	$(BIN)/python main.py --recipe demo

test: .venv/dev .venv/app
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest

app: .venv/app
	$(BIN)/python app.py

# In a real browser: CHROMIUM=/path names one; else the system's, else one that Playwright fetches.
test-app: .venv/dev .venv/app
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt playwright
	$(BIN)/python -m pytest tests/test_app.py tests/test_served.py tests/browser

battery: .venv/dev
	$(BIN)/python -m tests.battery

bench: .venv/run
	for name in input step overhead start peers tables; do $(BIN)/python -m benchmarks.$$name || exit 1; done

# pip-audit alone says "no known vulnerabilities" when it could look nothing up: hence --strict.
audit: .venv/dev
	$(BIN)/pip install --quiet --disable-pip-version-check pip-audit
	@$(BIN)/pip-audit --strict --disable-pip --no-deps -r constraints.txt > .venv/audit.log 2>&1; \
	code=$$?; cat .venv/audit.log; if grep -q "could not be audited" .venv/audit.log; then \
	echo "Nothing was audited: vulnerabilities cannot be looked up from here."; fi; exit $$code

.venv/run: requirements.txt constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt -c constraints.txt
	touch $@

.venv/dev: .venv/run requirements-dev.txt
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-dev.txt -c constraints.txt
	touch $@

.venv/app: .venv/run requirements-app.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps -r requirements-app.txt -c constraints.txt
	touch $@
