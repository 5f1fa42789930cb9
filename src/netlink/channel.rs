//! A netlink socket on which one asks.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::time::Duration;

use neli::ToBytes;
use neli::consts::nl::{NlmF, Nlmsg};
use neli::consts::socket::{Msg, NlFamily};
use neli::nl::{NlPayload, NlmsghdrBuilder};
use neli::socket::NlSocket;
use neli::types::Buffer;
use neli::utils::Groups;
use rustix::io::Errno;
use rustix::net::sockopt;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::closing::ClosedElsewhere;
use super::{Attributes, Body, Error, Message, Messages, Result};

/// How long the kernel may take. It answers at once; this only turns a hang into an error.
const PATIENCE: Duration = Duration::from_secs(10);
/// The largest piece that the kernel packs messages of a dump into is 32 KiB
/// (`netlink_dump` in `net/netlink/af_netlink.c`).
const BUFFER: usize = 64 * 1024;
/// How many requests are sent before their answers are read. Each answer waits in the socket's
/// receive buffer; thousands of them would overflow it (ENOBUFS).
const WINDOW: usize = 64;
/// `NLM_F_DUMP_INTR`: the table changed while it was dumped, so entries may be missing.
const INTERRUPTED: u16 = 0x10;
/// How often an interrupted dump is tried again.
const DUMP_TRIES: u32 = 16;

/// One request, ready to be sent.
#[derive(Debug, Clone)]
pub struct Request {
    /// `nlmsg_type`.
    pub kind: u16,
    /// `nlmsg_flags` beside REQUEST and ACK, which are set here.
    pub flags: NlmF,
    /// What is behind the header.
    pub body: Body,
}

impl Request {
    /// A request without flags.
    pub fn new(kind: u16, body: Body) -> Request {
        Request {
            kind,
            flags: NlmF::empty(),
            body,
        }
    }

    /// The same with flags.
    pub fn with(mut self, flags: NlmF) -> Request {
        self.flags |= flags;
        self
    }

    /// Appends the whole message to what is to be sent.
    pub(crate) fn write(self, sequence: u32, flags: NlmF, to: &mut Vec<u8>) -> io::Result<()> {
        let message = NlmsghdrBuilder::<u16, Buffer>::default()
            .nl_type(self.kind)
            .nl_flags(self.flags | flags | NlmF::REQUEST)
            .nl_seq(sequence)
            .nl_payload(NlPayload::Payload(Buffer::from(Vec::from(self.body))))
            .build()
            .map_err(io::Error::other)?;
        let mut cursor = io::Cursor::new(std::mem::take(to));
        cursor.set_position(cursor.get_ref().len() as u64);
        message.to_bytes(&mut cursor).map_err(io::Error::other)?;
        *to = cursor.into_inner();
        Ok(())
    }
}

/// A netlink socket on which one asks, and waits for the answer.
pub struct Channel {
    socket: ClosedElsewhere,
    sequence: u32,
    buffer: Vec<u8>,
}

impl std::fmt::Debug for Channel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Channel")
            .field("fd", &self.socket.as_raw_fd())
            .field("sequence", &self.sequence)
            .finish_non_exhaustive()
    }
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        borrow(&self.socket)
    }
}

/// The descriptor of a neli socket, which only gives its number away.
pub(crate) fn borrow(socket: &NlSocket) -> BorrowedFd<'_> {
    // SAFETY: the socket owns its descriptor and outlives the borrow.
    unsafe { BorrowedFd::borrow_raw(socket.as_raw_fd()) }
}

/// Lets tokio say when a socket can be read.
pub(crate) fn register(socket: NlSocket) -> io::Result<AsyncFd<NlSocket>> {
    socket.nonblock()?;
    // SAFETY: the descriptor belongs to the socket, which does not change it and closes it only
    // when it is dropped; from here on the AsyncFd owns the socket.
    unsafe { AsyncFd::register_with_interest(socket, Interest::READABLE) }
        .map_err(|e| e.into_parts().1)
}

/// Opens a netlink socket in the calling thread's network namespace.
pub(crate) fn open(family: NlFamily, groups: &[u32]) -> Result<NlSocket> {
    NlSocket::connect(family, None, Groups::new_groups(groups)).map_err(|source| Error::Socket {
        doing: "open a netlink socket",
        source,
    })
}

impl Channel {
    /// Opens a channel to a family in the calling thread's network namespace, where it stays.
    pub fn open(family: NlFamily) -> Result<Channel> {
        let socket = open(family, &[])?;
        sockopt::set_socket_timeout(borrow(&socket), sockopt::Timeout::Recv, Some(PATIENCE))
            .map_err(|errno| Error::Socket {
                doing: "bound the wait on a netlink socket",
                source: errno.into(),
            })?;
        // Extended acknowledgements say in words what the kernel did not like. Kernels since 4.12
        // have them; older ones do without.
        let _ = socket.enable_ext_ack(true);
        Ok(Channel {
            socket: socket.into(),
            sequence: 0,
            buffer: vec![0; BUFFER],
        })
    }

    fn next_sequence(&mut self) -> u32 {
        // Zero is what events carry.
        self.sequence = self.sequence.checked_add(1).unwrap_or(1);
        self.sequence
    }

    fn send(&self, bytes: &[u8], doing: &'static str) -> Result<()> {
        match self.socket.send(bytes, Msg::empty()) {
            Ok(_) => Ok(()),
            Err(source) => Err(Error::Socket { doing, source }),
        }
    }

    fn receive(&mut self, doing: &'static str) -> Result<usize> {
        loop {
            match self.socket.recv(&mut self.buffer[..], Msg::empty()) {
                Ok((length, _)) => return Ok(length.min(self.buffer.len())),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    return Err(Error::Silent {
                        doing,
                        seconds: PATIENCE.as_secs(),
                    });
                }
                Err(source) => return Err(Error::Socket { doing, source }),
            }
        }
    }

    /// Sends one request; returns the bodies of its answers once the kernel has acknowledged it.
    pub fn ask(&mut self, doing: &'static str, request: Request) -> Result<Vec<Vec<u8>>> {
        let sequence = self.next_sequence();
        let mut bytes = Vec::new();
        request
            .write(sequence, NlmF::ACK, &mut bytes)
            .map_err(|source| Error::Socket { doing, source })?;
        self.send(&bytes, doing)?;
        let mut answers = Vec::new();
        loop {
            let length = self.receive(doing)?;
            for message in Messages::new(&self.buffer[..length]) {
                if message.sequence != sequence {
                    continue;
                }
                match verdict(&message, doing)? {
                    Some(Ok(())) => return Ok(answers),
                    Some(Err(refused)) => return Err(refused),
                    None => answers.push(message.body.to_vec()),
                }
            }
        }
    }

    /// Sends many requests, a window of them at a time in one system call, and returns what became
    /// of each, in order.
    ///
    /// Only the last of a window is acknowledged: the kernel works through them in order, so when
    /// that answer is there, whatever was refused has been reported before it.
    pub fn ask_all(
        &mut self,
        doing: &'static str,
        requests: impl IntoIterator<Item = Request>,
    ) -> Result<Vec<Result<()>>> {
        let mut requests = requests.into_iter().peekable();
        let mut outcomes: Vec<Result<()>> = Vec::new();
        let mut bytes = Vec::new();
        while requests.peek().is_some() {
            bytes.clear();
            let before = outcomes.len();
            let first = self.sequence.wrapping_add(1);
            let mut last = first;
            // One window: as many as fit, so that its sequence numbers have no gap in them.
            if first > u32::MAX - WINDOW as u32 {
                self.sequence = 0;
                continue;
            }
            for at in 0..WINDOW {
                let Some(request) = requests.next() else {
                    break;
                };
                last = self.next_sequence();
                let acknowledge = at + 1 == WINDOW || requests.peek().is_none();
                let flags = if acknowledge {
                    NlmF::ACK
                } else {
                    NlmF::empty()
                };
                request
                    .write(last, flags, &mut bytes)
                    .map_err(|source| Error::Socket { doing, source })?;
                outcomes.push(Ok(()));
            }
            self.send(&bytes, doing)?;
            'window: loop {
                let length = self.receive(doing)?;
                for message in Messages::new(&self.buffer[..length]) {
                    if !(first..=last).contains(&message.sequence) {
                        continue;
                    }
                    if let Some(outcome) = verdict(&message, doing)? {
                        outcomes[before + (message.sequence - first) as usize] = outcome;
                        if message.sequence == last {
                            break 'window;
                        }
                    }
                }
            }
        }
        Ok(outcomes)
    }

    /// Sends several messages of one transaction, as nf_tables wants them: between a begin and an
    /// end, all or nothing. Returns the first refusal.
    ///
    /// `last` is the message whose acknowledgement tells that all was done: the one before the end.
    pub fn transact(
        &mut self,
        doing: &'static str,
        begin: Request,
        mut changes: Vec<Request>,
        end: Request,
    ) -> Result<()> {
        let mut bytes = Vec::new();
        let write = |sequence, request: Request, flags, bytes: &mut Vec<u8>| {
            request
                .write(sequence, flags, bytes)
                .map_err(|source| Error::Socket { doing, source })
        };
        let Some(final_change) = changes.pop() else {
            return Ok(());
        };
        if self.sequence > u32::MAX - changes.len() as u32 - 4 {
            self.sequence = 0;
        }
        let first = self.next_sequence();
        write(first, begin, NlmF::empty(), &mut bytes)?;
        for change in changes {
            let sequence = self.next_sequence();
            write(sequence, change, NlmF::empty(), &mut bytes)?;
        }
        let awaited = self.next_sequence();
        write(awaited, final_change, NlmF::ACK, &mut bytes)?;
        let last = self.next_sequence();
        write(last, end, NlmF::empty(), &mut bytes)?;
        self.send(&bytes, doing)?;
        loop {
            let length = self.receive(doing)?;
            for message in Messages::new(&self.buffer[..length]) {
                if !(first..=last).contains(&message.sequence) {
                    continue;
                }
                match verdict(&message, doing)? {
                    Some(Err(refused)) => return Err(refused),
                    Some(Ok(())) if message.sequence == awaited => return Ok(()),
                    _ => {}
                }
            }
        }
    }

    /// Sends a dump request and shows each answer's type and body to `each`.
    ///
    /// A dump during which the table changed may lack entries; it is then begun anew, after a call
    /// to `restart`, which forgets what `each` has gathered.
    pub fn dump<T>(
        &mut self,
        doing: &'static str,
        request: &Request,
        mut each: impl FnMut(&mut Vec<T>, &Message<'_>),
    ) -> Result<Vec<T>> {
        for _ in 0..DUMP_TRIES {
            let mut gathered = Vec::new();
            let sequence = self.next_sequence();
            let mut bytes = Vec::new();
            request
                .clone()
                .write(sequence, NlmF::DUMP, &mut bytes)
                .map_err(|source| Error::Socket { doing, source })?;
            self.send(&bytes, doing)?;
            let mut interrupted = false;
            'answers: loop {
                let length = self.receive(doing)?;
                for message in Messages::new(&self.buffer[..length]) {
                    if message.sequence != sequence {
                        continue;
                    }
                    interrupted |= message.flags & INTERRUPTED != 0;
                    match verdict(&message, doing)? {
                        Some(Ok(())) => break 'answers,
                        Some(Err(refused)) => return Err(refused),
                        None => each(&mut gathered, &message),
                    }
                }
            }
            if !interrupted {
                return Ok(gathered);
            }
        }
        Err(Error::Inconsistent {
            doing,
            tries: DUMP_TRIES,
        })
    }
}

/// What a message says about a request: done, refused, or (None) that it is an answer itself.
pub(super) fn verdict(message: &Message<'_>, doing: &'static str) -> Result<Option<Result<()>>> {
    let done = message.kind == u16::from(Nlmsg::Done);
    if !done && message.kind != u16::from(Nlmsg::Error) {
        return Ok(None);
    }
    let Some(code) = message.body.get(..4).and_then(|b| b.try_into().ok()) else {
        return if done {
            Ok(Some(Ok(())))
        } else {
            Err(Error::Malformed {
                doing,
                what: "an error message without an error number",
            })
        };
    };
    let code = i32::from_ne_bytes(code);
    if code >= 0 {
        return Ok(Some(Ok(())));
    }
    let Some(errno) = errno(code.saturating_neg()) else {
        return Err(Error::Malformed {
            doing,
            what: "an error number that there is not",
        });
    };
    Ok(Some(Err(Error::Refused {
        doing,
        errno,
        message: explanation(message),
    })))
}

/// What the kernel means by a number, if it can mean anything.
pub(crate) fn errno(number: i32) -> Option<Errno> {
    /// `MAX_ERRNO` of `linux/err.h`.
    const MAX_ERRNO: i32 = 4095;
    (1..=MAX_ERRNO)
        .contains(&number)
        .then(|| Errno::from_raw_os_error(number))
}

/// The kernel's words in an extended acknowledgement.
fn explanation(message: &Message<'_>) -> Option<String> {
    /// `NLM_F_ACK_TLVS`: attributes follow the echoed request.
    const ATTRIBUTES_FOLLOW: u16 = 0x200;
    /// `NLM_F_CAPPED`: of the request, only the header is echoed.
    const CAPPED: u16 = 0x100;
    /// `NLMSGERR_ATTR_MSG`.
    const WORDS: u16 = 1;
    if message.flags & ATTRIBUTES_FOLLOW == 0 {
        return None;
    }
    let echoed = message.body.get(4..)?;
    let length = if message.flags & CAPPED != 0 {
        16
    } else {
        u32::from_ne_bytes(echoed.get(..4)?.try_into().ok()?) as usize
    };
    Attributes::after(echoed, length)
        .find(|a| a.kind == WORDS)
        .map(|a| a.text())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_has_a_number_that_there_is() {
        let refusal = |code: i32| {
            let body = code.to_ne_bytes();
            let message = Message {
                kind: u16::from(Nlmsg::Error),
                flags: 0,
                sequence: 1,
                body: &body,
            };
            verdict(&message, "test")
        };
        assert!(matches!(refusal(0), Ok(Some(Ok(())))));
        let denied = refusal(-1).unwrap().unwrap().unwrap_err();
        assert_eq!(denied.errno(), Some(Errno::PERM));
        for code in [-4096, i32::MIN] {
            assert!(matches!(refusal(code), Err(Error::Malformed { .. })));
        }
    }
}
