//! Naming a process so that no other can be meant: by its number and the moment it started.
//!
//! Process numbers are used again. Whoever kills by number alone may hit a stranger.

use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde::{Deserialize, Serialize};

use super::error::{Error, Result};

/// A process of this host, now or in the past.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Process {
    /// Its number.
    pub pid: i32,
    /// When it started, in clock ticks after boot (field 22 of `/proc/<pid>/stat`, proc(5)).
    pub started: u64,
}

/// How often the end of a process is looked for.
const POLL: Duration = Duration::from_millis(5);

impl Process {
    /// The process that runs under this number now, if one does.
    pub fn running(pid: i32) -> Option<Self> {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // The second field is the name in parentheses and may hold anything, also parentheses.
        let fields = &stat[stat.rfind(')')? + 1..];
        let mut fields = fields.split_ascii_whitespace();
        let state = fields.next()?;
        // The state was field 3; field 20 is the seventeenth after it, field 22 two further.
        let threads: u32 = fields.nth(16)?.parse().ok()?;
        let started = fields.nth(1)?.parse().ok()?;
        // A zombie (Z) and a dead task (X) run no more, they wait for their parent only. But this
        // is the state of the first thread: as long as there are others, descriptors are open.
        if matches!(state, "Z" | "X") && threads <= 1 {
            return None;
        }
        Some(Self { pid, started })
    }

    /// This process.
    pub fn current() -> Option<Self> {
        Self::running(i32::try_from(std::process::id()).ok()?)
    }

    /// Whether it still runs.
    pub fn is_running(&self) -> bool {
        Self::running(self.pid) == Some(*self)
    }

    /// Ends it: SIGTERM, then after `patience` SIGKILL. Returns when it is gone; a process that is
    /// gone already, or whose number another process has by now, is left alone.
    ///
    /// # Errors
    /// [`Error::WouldNotEnd`] if it survives SIGKILL for as long again.
    pub async fn end(&self, interface: &str, patience: Duration) -> Result<()> {
        let Some(pid) = Pid::from_raw(self.pid) else {
            return Ok(());
        };
        // The descriptor stays with the process it was opened for: between the look at the start
        // time and the signal, the number cannot pass to another process.
        let handle = match pidfd_open(pid, PidfdFlags::empty()) {
            Ok(handle) => handle,
            Err(Errno::SRCH) => return Ok(()),
            Err(source) => {
                return Err(Error::File {
                    action: "open a handle on the process",
                    path: format!("/proc/{}", self.pid).into(),
                    source: source.into(),
                });
            }
        };
        for signal in [Signal::TERM, Signal::KILL] {
            if !self.is_running() {
                return Ok(());
            }
            match pidfd_send_signal(&handle, signal) {
                Ok(()) => {}
                Err(Errno::SRCH) => return Ok(()),
                Err(source) => {
                    return Err(Error::File {
                        action: "signal the process",
                        path: format!("/proc/{}", self.pid).into(),
                        source: source.into(),
                    });
                }
            }
            if self.ended_within(patience).await {
                return Ok(());
            }
        }
        Err(Error::WouldNotEnd {
            interface: interface.into(),
            pid: self.pid,
            waited: patience * 2,
        })
    }

    /// Waits until it has ended, at most `patience`; says whether it has.
    pub async fn ended_within(&self, patience: Duration) -> bool {
        let deadline = Instant::now() + patience;
        while self.is_running() {
            if Instant::now() >= deadline {
                return false;
            }
            tokio::time::sleep(POLL).await;
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn only_the_very_process_is_ended() {
        let mut child = std::process::Command::new("sleep")
            .arg("60")
            .spawn()
            .unwrap();
        let process = Process::running(i32::try_from(child.id()).unwrap()).unwrap();
        let older = Process {
            started: process.started - 1,
            ..process
        };
        older.end("test", Duration::from_secs(1)).await.unwrap();
        assert!(
            process.is_running(),
            "a process with another start time was ended"
        );
        process.end("test", Duration::from_secs(5)).await.unwrap();
        assert!(!process.is_running());
        child.wait().unwrap();
        process.end("test", Duration::from_secs(1)).await.unwrap();
    }

    #[tokio::test]
    async fn a_process_that_ignores_sigterm_is_killed() {
        let mut child = std::process::Command::new("sh")
            .args([
                "-c",
                "trap '' TERM; echo ready; while :; do sleep 0.1; done",
            ])
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let mut ready = [0; 5];
        std::io::Read::read_exact(child.stdout.as_mut().unwrap(), &mut ready).unwrap();
        let process = Process::running(i32::try_from(child.id()).unwrap()).unwrap();
        process
            .end("test", Duration::from_millis(200))
            .await
            .unwrap();
        assert!(!process.is_running());
        child.wait().unwrap();
    }
}
