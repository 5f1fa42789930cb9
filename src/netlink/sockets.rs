//! Socket diagnosis: which TCP and UDP sockets a namespace has and what waits in their queues.
//!
//! Before a container is frozen its sockets have to be quiet: CRIU drops what waits in a UDP
//! socket's receive queue and refuses connections that wait to be accepted.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use neli::consts::socket::NlFamily;
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use super::{Attributes, Body, Channel, Error, Message, Namespace, Request, Result};

/// `SOCK_DIAG_BY_FAMILY` of `linux/sock_diag.h`.
const BY_FAMILY: u16 = 20;
/// The size of `struct inet_diag_msg` of `linux/inet_diag.h`.
const ANSWER: usize = 72;
/// Where `idiag_rqueue` is in it.
const RECEIVE_QUEUE: usize = 56;
/// `INET_DIAG_INFO` and `INET_DIAG_SKMEMINFO` of `linux/inet_diag.h`.
const INFO: u16 = 2;
const SKMEMINFO: u16 = 7;
/// Where `tcpi_bytes_received` and `tcpi_data_segs_out` are in `struct tcp_info` of `linux/tcp.h`, which the
/// kernel only adds to.
const BYTES_RECEIVED: usize = 128;
const DATA_SEGMENTS_SENT: usize = 156;
const AF_INET: u8 = 2;
const AF_INET6: u8 = 10;
const IPPROTO_TCP: u8 = 6;
const IPPROTO_UDP: u8 = 17;

/// What state a TCP socket is in (`enum` in `net/tcp_states.h`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[expect(
    missing_docs,
    reason = "these are the names of RFC 9293, section 3.3.2"
)]
pub enum State {
    Established,
    SynSent,
    SynReceived,
    FinWait1,
    FinWait2,
    TimeWait,
    /// No connection; for UDP: a socket that is not connected.
    Close,
    CloseWait,
    LastAck,
    Listen,
    Closing,
    NewSynReceived,
}

impl State {
    fn from_kernel(number: u8) -> Option<State> {
        Some(match number {
            1 => State::Established,
            2 => State::SynSent,
            3 => State::SynReceived,
            4 => State::FinWait1,
            5 => State::FinWait2,
            6 => State::TimeWait,
            7 => State::Close,
            8 => State::CloseWait,
            9 => State::LastAck,
            10 => State::Listen,
            11 => State::Closing,
            12 => State::NewSynReceived,
            _ => return None,
        })
    }
}

/// TCP or UDP.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// A TCP socket.
    Tcp,
    /// A UDP socket.
    Udp,
}

/// One socket.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Socket {
    /// TCP or UDP.
    pub kind: Kind,
    /// Its state.
    pub state: State,
    /// Its own address and port.
    pub local: SocketAddr,
    /// Its peer's, or the unspecified address and port 0 without one.
    pub remote: SocketAddr,
    /// Bytes that the program has not read yet. For a listening socket: connections that wait to
    /// be accepted.
    pub receive_queue: u32,
    /// Bytes that the peer has not acknowledged yet. For a listening socket: how many connections
    /// may wait.
    pub send_queue: u32,
    /// The inode number of the socket: what `/proc/PID/fd` shows.
    pub inode: u32,
    /// How full its receive buffer is, where the kernel tells.
    pub receive_buffer: Option<ReceiveBuffer>,
}

/// The memory of a socket for what was not read yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReceiveBuffer {
    /// Bytes that are taken: data, and what the kernel needs for each packet.
    pub used: u32,
    /// Bytes that there are (`SO_RCVBUF`).
    pub size: u32,
    /// How many packets were dropped because there was no room, since the socket was made.
    pub drops: u32,
}

/// Which states of sockets are asked for. The kernel looks at listening sockets apart from all
/// others, which are far more work.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StateSet(u32);

impl StateSet {
    /// Every state.
    pub const ALL: StateSet = StateSet(u32::MAX);
    /// Sockets that listen.
    pub const LISTENING: StateSet = StateSet(1 << 10);
    /// Connections that peers have begun to open and that are not established yet.
    pub const OPENING: StateSet = StateSet(1 << 3 | 1 << 12);
}

impl Socket {
    /// Whether something waits in it that a program would have to take out before it is frozen:
    /// datagrams, or connections to be accepted. Unread bytes of a TCP connection are not meant:
    /// those are kept.
    pub fn has_undelivered(&self) -> bool {
        self.receive_queue > 0 && (self.kind == Kind::Udp || self.state == State::Listen)
    }
}

/// Every TCP and UDP socket in a namespace, over IPv4 and IPv6.
pub fn list(namespace: &Namespace) -> Result<Vec<Socket>> {
    Diagnosis::open(namespace)?.list()
}

/// A way to look at a namespace's sockets again and again.
#[derive(Debug)]
pub struct Diagnosis(Channel);

impl Diagnosis {
    /// Opens it in a namespace.
    pub fn open(namespace: &Namespace) -> Result<Diagnosis> {
        Ok(Diagnosis(
            namespace.run(|| Channel::open(NlFamily::SockOrInetDiag))??,
        ))
    }

    /// Every TCP and UDP socket, over IPv4 and IPv6.
    pub fn list(&mut self) -> Result<Vec<Socket>> {
        let mut all = self.look(Kind::Tcp, StateSet::ALL)?;
        all.extend(self.look(Kind::Udp, StateSet::ALL)?);
        Ok(all)
    }

    /// The sockets of one kind in some states, over IPv4 and IPv6.
    pub fn look(&mut self, kind: Kind, states: StateSet) -> Result<Vec<Socket>> {
        let mut all = Vec::new();
        for family in [AF_INET, AF_INET6] {
            // struct inet_diag_req_v2, for any address.
            let mut fixed = [0u8; 56];
            fixed[0] = family;
            fixed[1] = match kind {
                Kind::Tcp => IPPROTO_TCP,
                Kind::Udp => IPPROTO_UDP,
            };
            fixed[2] = 1 << (SKMEMINFO - 1);
            fixed[4..8].copy_from_slice(&states.0.to_ne_bytes());
            let request = Request::new(BY_FAMILY, Body::new(&fixed));
            all.extend(self.0.dump("list sockets", &request, |found, message| {
                found.extend(read(kind, message));
            })?);
        }
        Ok(all)
    }

    /// How far a TCP connection has come, by its own end and its peer's; none if it has gone. Asking for one by
    /// its ends costs the kernel next to nothing; a list of all takes it some milliseconds, for it goes through
    /// the sockets of all namespaces.
    pub fn progress(&mut self, local: SocketAddr, remote: SocketAddr) -> Result<Option<Progress>> {
        // struct inet_diag_req_v2, with a struct inet_diag_sockid.
        let mut fixed = [0u8; 56];
        fixed[0] = match local.ip() {
            IpAddr::V4(_) => AF_INET,
            IpAddr::V6(_) => AF_INET6,
        };
        fixed[1] = IPPROTO_TCP;
        fixed[2] = 1 << (INFO - 1);
        fixed[4..8].copy_from_slice(&StateSet::ALL.0.to_ne_bytes());
        for (at, end) in [(0, local), (1, remote)] {
            fixed[8 + 2 * at..10 + 2 * at].copy_from_slice(&end.port().to_be_bytes());
            match end.ip() {
                IpAddr::V4(ip) => fixed[12 + 16 * at..16 + 16 * at].copy_from_slice(&ip.octets()),
                IpAddr::V6(ip) => fixed[12 + 16 * at..28 + 16 * at].copy_from_slice(&ip.octets()),
            }
        }
        // INET_DIAG_NOCOOKIE: whichever socket it is.
        fixed[48..].fill(0xff);
        let request = Request::new(BY_FAMILY, Body::new(&fixed));
        match self.0.ask("look at a socket", request) {
            Err(Error::Refused {
                errno: Errno::NOENT,
                ..
            }) => Ok(None),
            answers => Ok(answers?.iter().find_map(|body| Progress::read(body))),
        }
    }
}

/// How far a TCP connection has come since its socket was made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress {
    /// How many segments with data it has sent.
    pub sent: u32,
    /// How many bytes have been received.
    pub received: u64,
    /// How many of those the program has not read.
    pub unread: u32,
}

impl Progress {
    fn read(answer: &[u8]) -> Option<Progress> {
        // For a connection that has gone the kernel answers with the socket that listens at its port.
        if State::from_kernel(*answer.get(1)?)? == State::Listen {
            return None;
        }
        let info = Attributes::after(answer, ANSWER).find(|attribute| attribute.kind == INFO)?;
        let sent = info.value.get(DATA_SEGMENTS_SENT..)?.first_chunk()?;
        let received = info.value.get(BYTES_RECEIVED..)?.first_chunk()?;
        let unread = answer.get(RECEIVE_QUEUE..)?.first_chunk()?;
        Some(Progress {
            sent: u32::from_ne_bytes(*sent),
            received: u64::from_ne_bytes(*received),
            unread: u32::from_ne_bytes(*unread),
        })
    }
}

/// Reads a `struct inet_diag_msg`.
pub(super) fn read(kind: Kind, message: &Message<'_>) -> Option<Socket> {
    let answer = message.body.get(..ANSWER)?;
    let word = |at: usize| -> Option<u32> {
        Some(u32::from_ne_bytes(answer.get(at..at + 4)?.try_into().ok()?))
    };
    let port = |at: usize| u16::from_be_bytes([answer[at], answer[at + 1]]);
    let address = |at: usize| -> Option<IpAddr> {
        Some(if answer[0] == AF_INET {
            IpAddr::from(Ipv4Addr::from(
                <[u8; 4]>::try_from(&answer[at..at + 4]).ok()?,
            ))
        } else {
            IpAddr::from(Ipv6Addr::from(
                <[u8; 16]>::try_from(&answer[at..at + 16]).ok()?,
            ))
        })
    };
    Some(Socket {
        kind,
        state: State::from_kernel(answer[1])?,
        local: SocketAddr::new(address(8)?, port(4)),
        remote: SocketAddr::new(address(24)?, port(6)),
        receive_queue: word(RECEIVE_QUEUE)?,
        send_queue: word(60)?,
        inode: word(68)?,
        receive_buffer: Attributes::after(message.body, ANSWER)
            .find(|attribute| attribute.kind == SKMEMINFO)
            .and_then(|attribute| receive_buffer(attribute.value)),
    })
}

/// Reads the array of `INET_DIAG_SKMEMINFO`: `SK_MEMINFO_RMEM_ALLOC`, `SK_MEMINFO_RCVBUF` and
/// `SK_MEMINFO_DROPS` of `linux/sock_diag.h`.
fn receive_buffer(memory: &[u8]) -> Option<ReceiveBuffer> {
    let word = |at: usize| -> Option<u32> {
        Some(u32::from_ne_bytes(
            memory.get(at * 4..at * 4 + 4)?.try_into().ok()?,
        ))
    };
    Some(ReceiveBuffer {
        used: word(0)?,
        size: word(1)?,
        drops: word(8)?,
    })
}
