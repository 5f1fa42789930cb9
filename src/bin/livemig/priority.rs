//! Who gets the processors while a container moves.
//!
//! Until the container is frozen its own work comes first: what livemig prepares on a busy host must not
//! make it late for what its peers send, for a socket holds a few milliseconds of a fast stream. Once
//! packets wait, or while the container stands still for a round of memory, livemig's work is what everybody
//! waits for.

use rustix::process::{Pid, setpriority_process};

/// What preparation runs at: behind everything that has not been told to stand back as well.
const BEHIND: i32 = 15;
/// What everything else runs at.
const ORDINARY: i32 = 0;

/// Lets others go first.
pub fn stand_back() {
    set(BEHIND);
}

/// Goes first with the others.
pub fn step_forward() {
    set(ORDINARY);
}

/// In Linux each thread has a nice value of its own, which those that it starts inherit.
fn set(nice: i32) {
    let threads = std::fs::read_dir("/proc/self/task").into_iter().flatten();
    for thread in threads.flatten() {
        let number = thread.file_name();
        let number = number.to_str().and_then(|number| number.parse().ok());
        let Some(thread) = number.and_then(Pid::from_raw) else {
            continue;
        };
        if let Err(error) = setpriority_process(Some(thread), nice) {
            tracing::debug!(%error, nice, "the priority stays as it is");
        }
    }
}
