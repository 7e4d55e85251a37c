//! The program's allocator, and what it does with freed memory.

/// Training allocates and frees buffers of megabytes at every operation; the system's allocator returns each to the kernel and
/// pays for its pages again.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// `mi_option_purge_delay` in mimalloc's `mimalloc.h`; its Rust bindings do not name it.
const PURGE_DELAY: libmimalloc_sys::mi_option_t = 15;

/// Keeps freed memory for the next step instead of handing it back to the kernel after a second.
///
/// Every training step frees and asks for the same activations; pages that went back meanwhile are cleared anew, a sixth of a
/// step's time. The peak is what one step needs either way.
pub(crate) fn keep_freed_memory() {
    // SAFETY: sets one integer option; mimalloc documents -1 as never purging.
    unsafe { libmimalloc_sys::mi_option_set(PURGE_DELAY, -1) };
}
