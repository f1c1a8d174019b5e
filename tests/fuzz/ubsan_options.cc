// SPDX-License-Identifier: Apache-2.0
//
// UBSan only prints by default; undefined behaviour is a finding like any other.
extern "C" const char* __ubsan_default_options();
extern "C" const char* __ubsan_default_options() { return "halt_on_error=1:print_stacktrace=1"; }
