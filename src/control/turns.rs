//! How long a thread that works beside requests may keep a core from them.
//!
//! Reading, hashing and building a large model takes a core for seconds. The scheduler lets whoever
//! runs finish a turn of some milliseconds before it lets in a thread that was woken, such as one
//! with a request to answer; where there are few cores that is what requests wait for. Since
//! Linux 6.12 a thread may ask for shorter turns, without privileges and without getting less of
//! the processor in the end. Older kernels do not mind being asked.

use std::mem::size_of;

/// The shortest that the kernel takes.
const TURN_NS: u64 = 100_000;

/// Asks for short turns for this thread, and for whatever threads and processes it starts.
#[expect(unsafe_code, reason = "the C library has no function for these system calls")]
pub(super) fn shorten() {
    let size = u32::try_from(size_of::<libc::sched_attr>()).unwrap_or(0);
    // SAFETY: the structure is made of integers, for which zeros are values.
    let mut attributes: libc::sched_attr = unsafe { std::mem::zeroed() };
    attributes.size = size;
    // SAFETY: the kernel writes at most `size` bytes into the structure, which lives on.
    let read = unsafe { libc::syscall(libc::SYS_sched_getattr, 0, &raw mut attributes, size, 0) };
    if read != 0 {
        return;
    }
    attributes.sched_runtime = TURN_NS;
    // SAFETY: the kernel only reads the structure, of the size that it says it has.
    let set = unsafe { libc::syscall(libc::SYS_sched_setattr, 0, &raw const attributes, 0) };
    if set != 0 {
        let error = std::io::Error::last_os_error();
        tracing::debug!(%error, "no shorter turns for a thread that loads");
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn asking_changes_nothing_else() {
        let nice = || rustix::process::getpriority_process(None).unwrap();
        let before = nice();
        super::shorten();
        assert_eq!(nice(), before);
    }
}
