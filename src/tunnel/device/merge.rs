//! Puts packets together that follow each other, so that they go through the kernel as one.
//!
//! It cuts them apart again where that is due: at the latest before the socket of a program that
//! expects them as they were sent. What the kernel's own GRO would put together is (dev_gro_receive
//! and its protocols in net/core/gro.c, net/ipv4/tcp_offload.c, net/ipv4/udp_offload.c), with one
//! difference: only packets that come right after each other, so that none overtakes another.

use super::offload::{self, Kind, Offload, Sum, TCP_CHECKSUM, UDP_CHECKSUM, set_length};

const TCP: u8 = 6;
const UDP: u8 = 17;
/// Flags of TCP: all but ACK and PSH end a run.
const ACK: u8 = 0x10;
const PSH: u8 = 0x08;
/// The most packets in one. The kernel has no limit for TCP; for UDP it is `UDP_MAX_SEGMENTS` of
/// include/linux/udp.h, which was 64 at first.
const PACKETS: usize = 64;
/// The most bytes in one: what the length field of IPv4 can say.
const BYTES: usize = 65_535;

/// The headers of a packet that may be part of a run.
#[derive(Debug, Clone, Copy)]
struct Shape {
    kind: Kind,
    protocol: u8,
    /// Where the transport header begins.
    transport: usize,
    /// Where the payload begins.
    payload: usize,
    sequence: u32,
    push: bool,
}

/// A run of packets that are to be written as one.
#[derive(Debug, Default)]
pub(super) struct Run {
    /// Room for the offload header, then the packets: the first one, and of the others the payload.
    frame: Vec<u8>,
    shape: Option<Shape>,
    /// The payload of the first packet, in bytes.
    size: usize,
    packets: usize,
    /// The last one was smaller or ends something: nothing may follow.
    ended: bool,
    /// The kernel can cut datagrams as well.
    datagrams: bool,
}

impl Run {
    /// No packets; `datagrams` if the kernel can cut those as well as streams.
    pub(super) fn new(datagrams: bool) -> Self {
        Self {
            datagrams,
            ..Self::default()
        }
    }

    /// Begins a run with a packet, if it can be part of one. The run before must have been taken.
    pub(super) fn begin(&mut self, packet: &[u8]) -> bool {
        let Some(shape) = shape_of(packet).filter(|shape| self.datagrams || shape.protocol == TCP)
        else {
            return false;
        };
        self.frame.clear();
        self.frame.resize(offload::LENGTH, 0);
        self.frame.extend_from_slice(packet);
        self.size = packet.len() - shape.payload;
        self.packets = 1;
        self.ended = shape.push;
        self.shape = Some(shape);
        true
    }

    /// Adds a packet, if it continues the run.
    pub(super) fn add(&mut self, packet: &[u8]) -> bool {
        let Some(run) = self.shape else {
            return false;
        };
        if self.ended || self.packets == PACKETS {
            return false;
        }
        let Some(shape) = shape_of(packet) else {
            return false;
        };
        let size = packet.len() - shape.payload;
        let first = &self.frame[offload::LENGTH..];
        if (shape.kind, shape.protocol, shape.payload) != (run.kind, run.protocol, run.payload)
            || size > self.size
            || first.len() + size > BYTES
            || !same_headers(first, packet, &shape)
        {
            return false;
        }
        // Less than 64 Ki.
        let so_far = (first.len() - run.payload) as u32;
        if shape.protocol == TCP && shape.sequence != run.sequence.wrapping_add(so_far) {
            return false;
        }
        self.frame.extend_from_slice(&packet[shape.payload..]);
        self.packets += 1;
        if shape.push {
            self.frame[offload::LENGTH + shape.transport + 13] |= PSH;
        }
        self.ended = shape.push || size < self.size;
        true
    }

    /// How many packets there are in the run.
    pub(super) fn packets(&self) -> usize {
        self.packets
    }

    /// What is to be written for the run, with the header in front, if there is one. It ends here.
    pub(super) fn take(&mut self) -> Option<&[u8]> {
        let shape = self.shape.take()?;
        let packets = std::mem::take(&mut self.packets);
        if packets > 1 {
            let (header, packet) = self.frame.split_at_mut(offload::LENGTH);
            let length = packet.len();
            set_length(packet, length);
            let field = if shape.protocol == TCP {
                TCP_CHECKSUM
            } else {
                let udp = (length - shape.transport) as u16;
                packet[shape.transport + 4..shape.transport + 6]
                    .copy_from_slice(&udp.to_be_bytes());
                UDP_CHECKSUM
            };
            let sum = Sum::default()
                .add_pseudo(packet, shape.protocol, length - shape.transport)
                .folded();
            let at = shape.transport + field;
            packet[at..at + 2].copy_from_slice(&sum);
            let offload = Offload {
                kind: shape.kind,
                size: self.size,
                checksum: Some((shape.transport, field)),
            };
            header.copy_from_slice(&offload.to_bytes(shape.payload));
        }
        Some(&self.frame)
    }
}

/// What a packet is, if it can be part of a run: TCP or UDP with a payload, whole, without IP
/// options and with a right checksum, for a wrong one must stay wrong.
fn shape_of(packet: &[u8]) -> Option<Shape> {
    let (transport, protocol, kind) = match packet.first()? >> 4 {
        4 => {
            let whole = packet.len() >= 20
                && packet[0] & 0xf == 5
                && usize::from(u16::from_be_bytes([packet[2], packet[3]])) == packet.len()
                // Neither more fragments to come nor an offset.
                && packet[6] & 0x3f == 0
                && packet[7] == 0;
            whole.then(|| (20, packet[9], Kind::Tcp4))?
        }
        6 => {
            let whole = packet.len() >= 40
                && usize::from(u16::from_be_bytes([packet[4], packet[5]])) + 40 == packet.len();
            whole.then(|| (40, packet[6], Kind::Tcp6))?
        }
        _ => return None,
    };
    let header = &packet[transport..];
    let mut shape = Shape {
        kind,
        protocol,
        transport,
        payload: transport + 8,
        sequence: 0,
        push: false,
    };
    match protocol {
        TCP if header.len() >= 20 => {
            let flags = header[13];
            if flags & !PSH != ACK || header[12] & 0xf != 0 {
                return None;
            }
            shape.payload = transport + usize::from(header[12] >> 4) * 4;
            shape.sequence = u32::from_be_bytes([header[4], header[5], header[6], header[7]]);
            shape.push = flags & PSH != 0;
            if shape.payload < transport + 20 {
                return None;
            }
        }
        UDP if header.len() >= 8 => {
            let length = usize::from(u16::from_be_bytes([header[4], header[5]]));
            // No checksum has none to be restored.
            if length != header.len() || header[UDP_CHECKSUM..8] == [0, 0] {
                return None;
            }
            shape.kind = Kind::Udp;
        }
        _ => return None,
    }
    let right = Sum::default()
        .add_pseudo(packet, protocol, header.len())
        .add(header)
        .complement()
        == [0, 0];
    (right && packet.len() > shape.payload).then_some(shape)
}

/// Whether two packets of one shape differ only in what the kernel makes up when it cuts them: the
/// length, identification and checksum of IPv4, the checksum of the rest, TCP's sequence and PSH.
fn same_headers(first: &[u8], packet: &[u8], shape: &Shape) -> bool {
    let same = |from: usize, to: usize| first[from..to] == packet[from..to];
    let ip = if shape.transport == 20 {
        same(0, 2) && same(6, 10) && same(12, 20)
    } else {
        same(0, 4) && same(6, 40)
    };
    let at = shape.transport;
    // Ports, then for TCP: acknowledgement, window, options.
    let transport = shape.protocol == UDP
        || same(at + 8, at + 13) && same(at + 14, at + 16) && same(at + 18, shape.payload);
    ip && same(at, at + 4) && transport
}
