"""One of torchrun's processes: runs a framework's table of cases. The first argument is the framework's module.

Nothing is imported before it is known that this is a rank. Processes that a rank starts by spawning run the file of its
`__main__` again (`datasets` starts one for every dataset that Axolotl saves), and would import all of a framework.
"""

if __name__ == "__main__":
    import sys
    from importlib import import_module

    run = import_module(sys.argv.pop(1)).run
    import_module("rankskit").run_cases(run)
