//! The netfilter queue: binding one that is free, what the kernel tells about packets, verdicts.
//!
//! Of each packet only the IP header is copied, with its length: enough to know whose it is and how
//! much room it takes. The rest stays in the kernel.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use neli::consts::nl::NlmF;
use neli::consts::socket::{Msg, NlFamily};
use neli::socket::NlSocket;
use rustix::io::Errno;
use rustix::net::sockopt;

use crate::conntrack::wire::{self, AF_UNSPEC, QUEUE_PACKET, nfqa, nfqa_cfg};
use crate::conntrack::{Error, Result};
use crate::netlink::{self, Attributes, Body, Message, Messages, Request, channel};

/// The first number that is tried. The low numbers are those that other programs take.
const FIRST: u16 = 0x6c00;
/// How many numbers are tried.
const NUMBERS: u16 = 4096;
/// How much of what the kernel tells about held packets may wait to be read, in bytes. A message
/// that finds no room costs its packet.
const RECEIVE_BUFFER: usize = 64 << 20;
/// How much of each packet is copied, in bytes: an IPv6 header, or an IPv4 header with two ports.
const COPIED: u32 = 40;
const UDP: u8 = 17;

/// The socket that a netfilter queue is bound to. Closed, the kernel drops what waits in the queue.
pub(super) struct Queue {
    pub(super) number: u16,
    pub(super) socket: NlSocket,
}

impl std::fmt::Debug for Queue {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Queue")
            .field("number", &self.number)
            .finish_non_exhaustive()
    }
}

impl Queue {
    /// Binds the first queue that nobody uses, in the calling thread's network namespace. Nothing
    /// is sent to it yet.
    ///
    /// The kernel refuses a queue that is taken, so whoever has one has it alone.
    pub(super) fn first_free() -> Result<Queue> {
        let socket = open()?;
        for number in FIRST..FIRST + NUMBERS {
            if bind(&socket, number)? {
                return Ok(Queue { number, socket });
            }
        }
        Err(Error::NoFreeQueue {
            first: FIRST,
            tried: NUMBERS,
        })
    }

    /// Binds the queue of this number.
    pub(super) fn of_number(number: u16) -> Result<Queue> {
        let socket = open()?;
        if bind(&socket, number)? {
            Ok(Queue { number, socket })
        } else {
            Err(Error::QueueTaken { queue: number })
        }
    }

    /// Says how many packets may wait, and what is to be told about each.
    ///
    /// `whole`: packets that were put together from several wait as one, and no checksum is computed.
    /// Else they are taken apart, and each waits for itself.
    pub(super) fn set_up(&self, packets: u32, whole: bool) -> Result<()> {
        // struct nfqnl_msg_config_params: how much of a packet is copied, and the mode.
        let mut parameters = [0u8; 5];
        parameters[..4].copy_from_slice(&COPIED.to_be_bytes());
        parameters[4] = nfqa_cfg::COPY_PACKET;
        let mask = nfqa_cfg::F_GSO.to_be_bytes();
        let flags = if whole { mask } else { [0; 4] };
        let request = config(self.number, |body| {
            body.leaf(nfqa_cfg::PARAMS, &parameters)
                .leaf(nfqa_cfg::QUEUE_MAXLEN, &packets.to_be_bytes())
                .leaf(nfqa_cfg::MASK, &mask)
                .leaf(nfqa_cfg::FLAGS, &flags);
        });
        match ask(&self.socket, request)? {
            None => Ok(()),
            Some(errno) => Err(refused(errno)),
        }
    }
}

fn open() -> Result<NlSocket> {
    let socket = channel::open(NlFamily::Netfilter, &[])?;
    let descriptor = channel::borrow(&socket);
    // Beyond net.core.rmem_max only root gets what it asks for.
    if sockopt::set_socket_recv_buffer_size_force(descriptor, RECEIVE_BUFFER).is_err() {
        let _ = sockopt::set_socket_recv_buffer_size(descriptor, RECEIVE_BUFFER);
    }
    Ok(socket)
}

/// Binds a queue, unless it is taken.
fn bind(socket: &NlSocket, number: u16) -> Result<bool> {
    // The answers of `nfqnl_recv_config` of `net/netfilter/nfnetlink_queue.c` for a queue that
    // somebody has.
    const TAKEN: [Errno; 3] = [Errno::PERM, Errno::BUSY, Errno::EXIST];
    let request = config(number, |body| {
        body.leaf(nfqa_cfg::CMD, &command(nfqa_cfg::CMD_BIND));
    });
    match ask(socket, request)? {
        None => Ok(true),
        Some(errno) if TAKEN.contains(&errno) => Ok(false),
        Some(errno) => Err(refused(errno)),
    }
}

const BIND: &str = "bind a netfilter queue";

fn refused(errno: Errno) -> Error {
    netlink::Error::Refused {
        doing: BIND,
        errno,
        message: None,
    }
    .into()
}

/// Sends a request and waits for its acknowledgement: nothing, or what is wrong.
fn ask(socket: &NlSocket, request: Request) -> Result<Option<Errno>> {
    let failed = |e| socket_error(BIND, e);
    let mut bytes = Vec::new();
    request.write(1, NlmF::ACK, &mut bytes).map_err(failed)?;
    socket.send(&bytes, Msg::empty()).map_err(failed)?;
    let mut buffer = [0; 4096];
    let (length, _) = socket.recv(&mut buffer[..], Msg::empty()).map_err(failed)?;
    let code = Messages::new(&buffer[..length.min(4096)])
        .find_map(|message| error_number(&message))
        .unwrap_or(0);
    // A refusal without a reason is one all the same.
    Ok((code != 0).then(|| channel::errno(code).unwrap_or(Errno::INVAL)))
}

/// The number in an acknowledgement: 0, or what went wrong.
fn error_number(message: &Message<'_>) -> Option<i32> {
    if message.kind != u16::from(neli::consts::nl::Nlmsg::Error) {
        return None;
    }
    let code = i32::from_ne_bytes(message.body.get(..4)?.try_into().ok()?);
    Some(code.saturating_neg())
}

pub(super) fn socket_error(doing: &'static str, source: io::Error) -> Error {
    netlink::Error::Socket { doing, source }.into()
}

/// `struct nfqnl_msg_config_cmd`.
pub(super) fn command(command: u8) -> [u8; 4] {
    [command, 0, 0, 0]
}

pub(super) fn config(queue: u16, fill: impl FnOnce(&mut Body)) -> Request {
    let mut body = Body::netfilter(AF_UNSPEC, queue);
    fill(&mut body);
    Request::new(wire::QUEUE_CONFIG, body)
}

/// A verdict on one packet (`QUEUE_VERDICT`), or on *all* up to it (`QUEUE_VERDICT_BATCH`).
pub(super) fn verdict(queue: u16, kind: u16, verdict: u32, id: u32) -> Request {
    let mut header = [0u8; 8];
    header[..4].copy_from_slice(&verdict.to_be_bytes());
    header[4..].copy_from_slice(&id.to_be_bytes());
    let mut body = Body::netfilter(AF_UNSPEC, queue);
    body.leaf(nfqa::VERDICT_HDR, &header);
    Request::new(kind, body)
}

/// How many packets a queue has dropped: for its bound, and for want of room in the socket.
/// The sixth and seventh column of the file (`seq_show` in `net/netfilter/nfnetlink_queue.c`).
pub(super) fn dropped(queue: u16) -> u64 {
    let Ok(text) = std::fs::read_to_string("/proc/thread-self/net/netfilter/nfnetlink_queue")
    else {
        return 0;
    };
    text.lines()
        .map(|line| -> Vec<u64> {
            line.split_whitespace()
                .map(|field| field.parse().unwrap_or(0))
                .collect()
        })
        .find(|fields| fields.first() == Some(&u64::from(queue)))
        .map_or(0, |fields| fields.iter().skip(5).take(2).sum())
}

/// What the kernel tells about a packet that waits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::conntrack) struct Notice {
    /// Its number in the queue: each packet has the next one.
    pub id: u32,
    /// The interface it came in by.
    pub interface: Option<u32>,
    /// Its size in bytes, with its IP header.
    pub length: u32,
    /// Whether it is several packets of a flow that were put together.
    pub together: bool,
    /// What its IP header says.
    pub header: Header,
}

impl Notice {
    /// Reads a message of a queue; none if it is an acknowledgement or the error of a verdict
    /// (there was nothing to release), which say nothing.
    pub(in crate::conntrack) fn read(message: &Message<'_>) -> Option<Notice> {
        if message.kind != QUEUE_PACKET {
            return None;
        }
        let (mut id, mut interface, mut full_length) = (None, None, None);
        let mut together = false;
        let mut copied: &[u8] = &[];
        for attribute in Attributes::after(message.body, 4) {
            match attribute.kind {
                // struct nfqnl_msg_packet_hdr begins with the packet's number.
                nfqa::PACKET_HDR => id = attribute.be32(),
                nfqa::IFINDEX_INDEV => interface = attribute.be32(),
                // Only if more than what is copied was there.
                nfqa::CAP_LEN => full_length = attribute.be32(),
                nfqa::SKB_INFO => {
                    together = attribute.be32().is_some_and(|it| it & nfqa::SKB_GSO != 0);
                }
                nfqa::PAYLOAD => copied = attribute.value,
                _ => {}
            }
        }
        Some(Notice {
            id: id?,
            interface,
            together,
            length: full_length.unwrap_or(copied.len() as u32),
            header: Header::read(copied),
        })
    }
}

/// What an IP header says; nothing where it is cut short.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(in crate::conntrack) struct Header {
    /// The number of the protocol inside.
    pub protocol: Option<u8>,
    /// Who sent it.
    pub source: Option<IpAddr>,
}

impl Header {
    /// Reads the beginning of an IPv4 (RFC 791, section 3.1) or IPv6 header (RFC 8200, section 3).
    ///
    /// Extension headers of IPv6 are not followed: a datagram behind one counts as not UDP, and is
    /// merely released without a pace.
    fn read(bytes: &[u8]) -> Header {
        match bytes.first().map(|byte| byte >> 4) {
            Some(4) => Header {
                protocol: bytes.get(9).copied(),
                source: octets::<4>(bytes, 12).map(|it| Ipv4Addr::from(it).into()),
            },
            Some(6) => Header {
                protocol: bytes.get(6).copied(),
                source: octets::<16>(bytes, 8).map(|it| Ipv6Addr::from(it).into()),
            },
            _ => Header::default(),
        }
    }

    pub(in crate::conntrack) fn is_udp(&self) -> bool {
        self.protocol == Some(UDP)
    }
}

fn octets<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..at + N)?.try_into().ok()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn notice(packet: &[u8], full: Option<u32>) -> Option<Notice> {
        let mut body = Body::netfilter(2, 7);
        body.leaf(nfqa::PACKET_HDR, &[0, 0, 0, 9, 8, 0, 0])
            .leaf(nfqa::IFINDEX_INDEV, &3u32.to_be_bytes());
        if let Some(full) = full {
            body.leaf(nfqa::CAP_LEN, &full.to_be_bytes());
        }
        body.leaf(nfqa::PAYLOAD, packet);
        Notice::read(&Message {
            kind: QUEUE_PACKET,
            flags: 0,
            sequence: 0,
            body: body.as_bytes(),
        })
    }

    #[test]
    fn headers_of_both_families_are_read() {
        let mut four = [0u8; 33];
        four[0] = 0x45;
        four[9] = 17;
        four[12..16].copy_from_slice(&[10, 88, 0, 5]);
        let found = notice(&four, None).unwrap();
        assert_eq!((found.id, found.interface, found.length), (9, Some(3), 33));
        assert!(found.header.is_udp());
        assert_eq!(found.header.source, Some("10.88.0.5".parse().unwrap()));
        let mut six = [0u8; 40];
        six[0] = 0x60;
        six[6] = 6;
        six[8..24].copy_from_slice(&"fd00::5".parse::<Ipv6Addr>().unwrap().octets());
        let found = notice(&six, Some(65_000)).unwrap();
        assert_eq!(found.length, 65_000);
        assert!(!found.header.is_udp());
        assert_eq!(found.header.source, Some("fd00::5".parse().unwrap()));
    }

    proptest! {
        #[test]
        fn whatever_is_copied_is_read(bytes in prop::collection::vec(any::<u8>(), 0..48)) {
            let found = notice(&bytes, None).unwrap();
            prop_assert_eq!(found.length as usize, bytes.len());
            prop_assert!(found.header.source.is_none() || bytes.len() >= 16);
        }
    }
}
