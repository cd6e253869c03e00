"""The only place that imports DeepSpeed, and where its faults are worked around.

DeepSpeed's private attributes are in `optimizer_storage.py`. Each workaround says what happens without it;
`tests/distributed/parallel/test_zero_traps.py` shows it.

Constraints we obey rather than work around: a stage calls its own submodules (a weight that is read without calling its
module is not gathered), runs one backward pass per forward pass (several within one would reduce a parameter twice), is
built anew rather than copied, and is saved through `state_tensors` (a partitioned module's state_dict is empty).
"""
