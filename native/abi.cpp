// The version of the functions in this folder; camelid/kernels/library.py refuses a library of another.
extern "C" int camelid_abi() { return 14; }
