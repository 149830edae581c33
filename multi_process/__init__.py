"""The distributed runtime: a FedLab server manager and its workers. The only importer of torch.distributed."""

from __future__ import annotations

from compat import import_fedlab

import_fedlab("fedlab.core")
