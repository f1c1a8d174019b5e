// SPDX-License-Identifier: Apache-2.0
#include "server/pipeline/numeric.h"
