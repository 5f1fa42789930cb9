//! What runs when a runtime calls `criu` and finds livemig under that name.
//!
//! Runtimes call CRIU several times, to ask it things, and once to have it do the work; each time as
//! `criu swrk N`, with the request on the socket N (CRIU's `criu/cr-service.c`). So the request is looked
//! at, without taking it, and the work waits for livemig's word ([`super::standby`]). Then this becomes
//! CRIU, which finds the request where it was.

use std::ffi::OsString;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, ExitCode};

use rustix::io::{FdFlags, fcntl_setfd};
use rustix::net::{RecvFlags, recv};
use rustix::process::{getpriority_process, setpriority_process};

use super::setup::Links;
use super::standby::{GO, OPTIONS, SOCKET};

/// Does what CRIU was called for. Returns only if that did not become CRIU's work.
pub fn run(program: &Path, arguments: Vec<OsString>) -> ExitCode {
    let real = Links::beside(program).real();
    if let Err(error) = wait(&arguments) {
        eprintln!("livemig: CRIU was not let begin: {error}");
        return ExitCode::FAILURE;
    }
    let error = Command::new(&real).args(arguments).exec();
    eprintln!("livemig: cannot become {}: {error}", real.display());
    ExitCode::FAILURE
}

/// Waits for livemig's word, if it is about work that livemig waits for.
fn wait(arguments: &[OsString]) -> io::Result<()> {
    let Some(socket) = std::env::var_os(SOCKET) else {
        return Ok(());
    };
    let number = match arguments {
        [mode, number] if mode == "swrk" => number.to_str().and_then(|text| text.parse().ok()),
        _ => None,
    };
    let Some(request) = number else {
        return Ok(());
    };
    let dumps = match Work::of(request)? {
        None => return Ok(()),
        Some(work) => work == Work::Dump,
    };
    let mut livemig = UnixStream::connect(socket)?;
    let mut word = [0];
    livemig.read_exact(&mut word)?;
    if word != [GO] {
        return Err(io::Error::other("livemig's word is not understood"));
    }
    go_first();
    if dumps && let Some(options) = std::env::var_os(OPTIONS) {
        // CRIU uses the connection itself: it has to stay open, under a number that CRIU knows.
        fcntl_setfd(&livemig, FdFlags::empty())?;
        let mut options = std::fs::OpenOptions::new().append(true).open(options)?;
        writeln!(options, "ps-socket {}", livemig.as_raw_fd())?;
        std::mem::forget(livemig);
    }
    Ok(())
}

/// Runs like everything else from here on: whoever prepares a move may stand back for what its host does, and
/// so does what it starts, but now a container stands still until this is done.
fn go_first() {
    let stands_back = getpriority_process(None).is_ok_and(|nice| nice > 0);
    if stands_back && let Err(error) = setpriority_process(None, 0) {
        // It works all the same.
        eprintln!("livemig: CRIU runs behind others: {error}");
    }
}

/// The requests that are work (`criu_req_type` in CRIU's `images/rpc.proto`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Work {
    Dump,
    Restore,
}

impl Work {
    /// What is asked for on this socket; nothing if it is only a question.
    fn of(socket: RawFd) -> io::Result<Option<Work>> {
        // SAFETY: the number is that of a socket which the runtime has left open for CRIU; nothing in this
        // process closes it, and if there is none, receiving fails.
        let socket = unsafe { BorrowedFd::borrow_raw(socket) };
        let mut head = [0; 2];
        let (got, _) = recv(socket, &mut head[..], RecvFlags::PEEK)?;
        Ok(match head {
            // The first field is the type: number 1, an integer. Rounds of memory (`PRE_DUMP`) crun asks for
            // one at a time (`SINGLE_PRE_DUMP`).
            [0x08, 1 | 4 | 13] if got == 2 => Some(Work::Dump),
            [0x08, 2] if got == 2 => Some(Work::Restore),
            _ => None,
        })
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use rustix::net::{AddressFamily, SendFlags, SocketFlags, SocketType, send, socketpair};

    use super::*;

    /// What is asked for with a request of this type; the request is still there afterwards.
    fn asked(kind: u8) -> Option<Work> {
        let (runtime, criu) = socketpair(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC,
            None,
        )
        .unwrap();
        send(&runtime, &[0x08, kind, 0x12, 0], SendFlags::empty()).unwrap();
        let work = Work::of(criu.as_raw_fd()).unwrap();
        let mut left = [0; 8];
        let (got, _) = recv(criu.as_fd(), &mut left[..], RecvFlags::empty()).unwrap();
        assert_eq!(left[..got], [0x08, kind, 0x12, 0]);
        work
    }

    /// In Linux a thread has a nice value of its own: this one ends with the test.
    #[test]
    fn criu_does_not_stand_back_though_it_was_started_by_one_that_does() {
        let now = || getpriority_process(None).unwrap();
        let before = now();
        setpriority_process(None, 15).unwrap();
        go_first();
        assert_eq!(now(), 0);
        // What somebody has given more than others keeps it.
        setpriority_process(None, -1).unwrap();
        go_first();
        assert_eq!(now(), -1);
        setpriority_process(None, before).unwrap();
    }

    #[test]
    fn work_is_told_from_questions() {
        // DUMP, PRE_DUMP, SINGLE_PRE_DUMP.
        for dump in [1, 4, 13] {
            assert_eq!(asked(dump), Some(Work::Dump), "{dump}");
        }
        assert_eq!(asked(2), Some(Work::Restore));
        // CHECK, FEATURE_CHECK, VERSION.
        for question in [3, 9, 10] {
            assert_eq!(asked(question), None, "{question}");
        }
    }
}
