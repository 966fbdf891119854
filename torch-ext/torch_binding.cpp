// The files of csrc/ register their ops themselves, in fragments of the namespace.
#include <torch/csrc/stable/library.h>

#include "registration.h"

REGISTER_EXTENSION(TORCH_EXTENSION_NAME)
