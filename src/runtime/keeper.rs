//! A process that does nothing but see to it that a container does not go on without its memory.
//!
//! With post-copy the kernel asks for what a container touches through userfaultfds, which criu lazy-pages has.
//! When the last copy of one is closed, whoever touches a page that has not come gets zeros and goes on
//! (userfaultfd(2)): a database would write them to its disk. criu lazy-pages ends when memory does not come, and
//! that is so as soon as the agent dies, or is started anew. So this process has copies, too. It waits until
//! it is told that all memory is there; if the agent has gone before, it ends the container, and only
//! then closes them.
//!
//! It is started before the container is frozen at its source, and hears of it when it is there.

use std::ffi::OsString;
use std::io::{self, BufRead, BufReader};
use std::os::fd::OwnedFd;
use std::process::ExitCode;

use rustix::process::{PidfdGetfdFlags, Signal, pidfd_getfd, pidfd_send_signal};

use super::Result;
use super::companion::{Companion, process};
use crate::Config;

/// The name that livemig is called by for this.
pub(super) const NAME: &str = "livemig-keep";
/// What the kernel calls a userfaultfd in `/proc/PID/fd`.
const USERFAULTFD: &str = "anon_inode:[userfaultfd]";
/// What it is told when all memory is there.
const DONE: &str = "done";

/// A container whose memory is being fetched, and copies of the userfaultfds through which it waits.
#[derive(Debug)]
pub struct Faults {
    container: OwnedFd,
    copies: Vec<OwnedFd>,
}

impl Faults {
    /// Those of a container, by its first process, that this criu lazy-pages has.
    ///
    /// # Errors
    /// If one of them has gone.
    pub fn of(criu: u32, container: u32) -> io::Result<Faults> {
        let container = process(container)?;
        let lazy_pages = process(criu)?;
        let mut copies = Vec::new();
        for entry in std::fs::read_dir(format!("/proc/{criu}/fd"))?.flatten() {
            let leads_to = std::fs::read_link(entry.path()).unwrap_or_default();
            let name = entry.file_name();
            let number = name.to_str().and_then(|name| name.parse().ok());
            if let (USERFAULTFD, Some(number)) = (leads_to.to_str().unwrap_or_default(), number) {
                copies.push(pidfd_getfd(&lazy_pages, number, PidfdGetfdFlags::empty())?);
            }
        }
        Ok(Faults { container, copies })
    }

    /// Ends the container. Who waits for a page goes on only after that, and so not at all.
    pub fn end_container(self) {
        // It may have ended by itself.
        let _ = pidfd_send_signal(&self.container, Signal::KILL);
        drop(self.copies);
    }
}

/// Ends a container when this has gone before all of its memory is there.
#[derive(Debug)]
pub struct Keeper(Companion);

impl Keeper {
    /// Starts the process, for a container whose memory this criu lazy-pages will have.
    ///
    /// # Errors
    /// [`Error::Start`](super::Error::Start).
    pub fn start(config: &Config, criu: u32) -> Result<Keeper> {
        Companion::start(config, NAME, [criu.to_string()]).map(Keeper)
    }

    /// The container is there, with this first process.
    ///
    /// # Errors
    /// [`Error::Lost`](super::Error::Lost) if the process has gone.
    pub async fn keep(&mut self, container: u32) -> Result<()> {
        self.0.tell(&container.to_string()).await
    }

    /// All of its memory is there. Returns when the process has nothing to do with it any more.
    ///
    /// # Errors
    /// [`Error::Lost`](super::Error::Lost) if it had gone before.
    pub async fn done(mut self) -> Result<()> {
        self.0.tell(DONE).await?;
        self.0.end().await?;
        Ok(())
    }
}

/// What that process does.
pub(super) fn run(arguments: &[OsString]) -> ExitCode {
    let text: Vec<&str> = arguments.iter().filter_map(|text| text.to_str()).collect();
    let kept = match text[..] {
        [criu] => criu.parse().map_err(io::Error::other),
        _ => Err(io::ErrorKind::InvalidInput.into()),
    };
    let kept = kept.and_then(|criu| keep(BufReader::new(io::stdin()), |pid| Faults::of(criu, pid)));
    match kept {
        Ok(None) => ExitCode::SUCCESS,
        Ok(Some(faults)) => {
            faults.end_container();
            ExitCode::FAILURE
        }
        Err(_) => ExitCode::FAILURE,
    }
}

/// Hears which container is to be kept, and until when. Returns what was kept of it if that was not the end of it.
fn keep<F>(
    mut hears: impl BufRead,
    faults: impl FnOnce(u32) -> io::Result<F>,
) -> io::Result<Option<F>> {
    let mut word = String::new();
    if hears.read_line(&mut word)? == 0 {
        // It never came.
        return Ok(None);
    }
    let container = word.trim_end().parse().map_err(io::Error::other)?;
    let kept = faults(container)?;
    word.clear();
    // A pipe that breaks has nothing more to say either.
    let _ = hears.read_line(&mut word);
    Ok((word.trim_end() != DONE).then_some(kept))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_container_ends_if_nobody_says_that_its_memory_is_there() {
        let kept = |said: &str| keep(said.as_bytes(), Ok).unwrap();
        assert_eq!(kept("17\n"), Some(17));
        assert_eq!(kept("17\ndone\n"), None);
        // Nor if it is cut off.
        assert_eq!(kept("17\ndo"), Some(17));
        assert_eq!(kept(""), None);
        assert!(keep(&b"x\n"[..], Ok).is_err());
    }

    #[test]
    fn what_is_kept_is_ended() {
        let mut container = std::process::Command::new("sleep")
            .arg("60")
            .spawn()
            .unwrap();
        let faults = Faults::of(std::process::id(), container.id()).unwrap();
        assert!(faults.copies.is_empty());
        faults.end_container();
        assert!(!container.wait().unwrap().success());
    }
}
