//! What mimalloc, the program's allocator, does with freed memory.

/// `mi_option_purge_delay` in mimalloc's `mimalloc.h`; its Rust bindings do not name it.
const PURGE_DELAY: libmimalloc_sys::mi_option_t = 15;

/// Keeps freed memory for the next step instead of handing it back to the kernel after a second.
///
/// Every training step frees and asks for the same activations; pages that went back meanwhile are cleared anew, a sixth of a
/// step's time. The peak is what one step needs either way.
pub fn keep_freed_memory() {
    // SAFETY: sets one integer option; mimalloc documents -1 as never purging.
    unsafe { libmimalloc_sys::mi_option_set(PURGE_DELAY, -1) };
}

/// Hands freed memory back to the kernel now.
///
/// mimalloc does so on its own while it is asked for memory, which an idle server does not do.
#[cfg(feature = "mistralrs")]
pub(crate) fn return_freed_memory() {
    // SAFETY: takes no pointers; mimalloc allows it on any thread, at any time.
    unsafe { libmimalloc_sys::mi_collect(true) };
}
