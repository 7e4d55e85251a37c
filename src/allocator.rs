//! Sets how mimalloc, the program's allocator, handles freed memory.

/// `mi_option_purge_delay` in mimalloc's `mimalloc.h`; its Rust bindings do not name it.
const PURGE_DELAY: libmimalloc_sys::mi_option_t = 15;

/// Keeps freed memory for the next step. By default mimalloc returns it to the kernel after a second.
///
/// Every training step frees and requests the same activations. The kernel must clear pages again that were returned in
/// between, which takes a sixth of a step's time. The peak memory is what one step needs, with or without this.
pub fn keep_freed_memory() {
    // SAFETY: sets one integer option; mimalloc documents -1 as never purging.
    unsafe { libmimalloc_sys::mi_option_set(PURGE_DELAY, -1) };
}

/// Returns freed memory to the kernel now.
///
/// mimalloc does so by itself only when memory is requested, which an idle server does not do.
#[cfg(feature = "mistralrs")]
pub(crate) fn return_freed_memory() {
    // SAFETY: takes no pointers; mimalloc allows it on any thread, at any time.
    unsafe { libmimalloc_sys::mi_collect(true) };
}
