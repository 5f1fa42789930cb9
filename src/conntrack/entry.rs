//! One connection as the kernel knows it, and how it is written to and read from ctnetlink.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::wire::{self, AF_INET, AF_INET6, counters, cta, ip, nat, proto, protoinfo, tuple};
use super::{Mark, Protocol, Tuple};
use crate::netlink::{Attribute, Attributes, Body, Message};

/// What the kernel has seen of a connection: `enum ip_conntrack_status` of
/// `linux/netfilter/nf_conntrack_common.h`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Status(u32);

impl Status {
    /// Packets were seen in both directions.
    pub const SEEN_REPLY: Status = Status(1 << 1);
    /// It is not dropped early when the table is full.
    pub const ASSURED: Status = Status(1 << 2);
    /// It is in the table.
    pub const CONFIRMED: Status = Status(1 << 3);
    /// Its source is translated.
    pub const SOURCE_NAT: Status = Status(1 << 4);
    /// Its destination is translated.
    pub const DESTINATION_NAT: Status = Status(1 << 5);
    /// What has a meaning on another host too. Translation has none: it stays where it is.
    pub const PORTABLE: Status =
        Status(Status::SEEN_REPLY.0 | Status::ASSURED.0 | Status::CONFIRMED.0);

    /// A status as the kernel has it.
    pub const fn from_bits(bits: u32) -> Status {
        Status(bits)
    }

    /// The status as the kernel has it.
    pub const fn bits(self) -> u32 {
        self.0
    }

    /// Whether all of `other`'s bits are set.
    pub const fn has(self, other: Status) -> bool {
        self.0 & other.0 == other.0
    }

    /// Both together.
    #[must_use]
    pub const fn and(self, other: Status) -> Status {
        Status(self.0 | other.0)
    }

    /// Only what has a meaning on another host.
    #[must_use]
    pub const fn portable(self) -> Status {
        Status(self.0 & Status::PORTABLE.0)
    }
}

/// The state of a TCP connection: `enum tcp_conntrack` of
/// `linux/netfilter/nf_conntrack_tcp.h`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[expect(
    missing_docs,
    reason = "these are the names of RFC 9293, section 3.3.2"
)]
pub enum TcpState {
    None,
    SynSent,
    SynReceived,
    Established,
    FinWait,
    CloseWait,
    LastAck,
    TimeWait,
    Close,
    /// A simultaneous open.
    SynSent2,
}

impl TcpState {
    const ALL: [TcpState; 10] = [
        TcpState::None,
        TcpState::SynSent,
        TcpState::SynReceived,
        TcpState::Established,
        TcpState::FinWait,
        TcpState::CloseWait,
        TcpState::LastAck,
        TcpState::TimeWait,
        TcpState::Close,
        TcpState::SynSent2,
    ];

    fn from_kernel(number: u8) -> Option<TcpState> {
        TcpState::ALL.get(usize::from(number)).copied()
    }

    const fn number(self) -> u8 {
        self as u8
    }
}

/// What is tracked of one side of a TCP connection.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct TcpSide {
    /// By how many bits its window is shifted (RFC 7323).
    pub window_scale: u8,
    /// `IP_CT_TCP_FLAG_*`.
    pub flags: u8,
}

impl TcpSide {
    /// `IP_CT_TCP_FLAG_WINDOW_SCALE`, `_SACK_PERM` and `_BE_LIBERAL`: what may be handed to
    /// another host. The others are moments of the connection that its packets bring about again.
    const PORTABLE: u8 = 0x01 | 0x02 | TcpSide::BE_LIBERAL;
    /// `IP_CT_TCP_FLAG_BE_LIBERAL`: packets outside the window are let through. A host that did
    /// not see the connection from its beginning does not know the window.
    pub const BE_LIBERAL: u8 = 0x08;

    /// The same, with packets outside the window let through.
    #[must_use]
    pub const fn liberal(self) -> TcpSide {
        TcpSide {
            window_scale: self.window_scale,
            flags: (self.flags & TcpSide::PORTABLE) | TcpSide::BE_LIBERAL,
        }
    }
}

/// What is tracked of a TCP connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct TcpInfo {
    /// Its state.
    pub state: TcpState,
    /// The side that opened it.
    pub original: TcpSide,
    /// The other side.
    pub reply: TcpSide,
}

impl TcpInfo {
    /// The same, with packets outside the window let through in both directions.
    #[must_use]
    pub const fn liberal(self) -> TcpInfo {
        TcpInfo {
            state: self.state,
            original: self.original.liberal(),
            reply: self.reply.liberal(),
        }
    }
}

/// What is tracked of an SCTP association.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct SctpInfo {
    /// Its state: `enum sctp_conntrack` of `linux/netfilter/nf_conntrack_sctp.h`.
    pub state: u8,
    /// The verification tag of the side that opened it.
    pub original_tag: u32,
    /// The verification tag of the other side.
    pub reply_tag: u32,
}

/// How much one direction has carried, where the kernel counts it
/// (`net.netfilter.nf_conntrack_acct`).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Counters {
    /// Packets.
    pub packets: u64,
    /// Bytes, with IP headers.
    pub bytes: u64,
}

/// One connection as the kernel of some host knows it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// The direction of the first packet, as it arrived here.
    pub original: Tuple,
    /// The direction of the answers, as they arrive here.
    pub reply: Tuple,
    /// What was seen of it.
    pub status: Status,
    /// When it is forgotten if no packet comes. Whole seconds.
    pub timeout: Duration,
    /// Its mark.
    pub mark: Mark,
    /// Of a TCP connection: its state.
    pub tcp: Option<TcpInfo>,
    /// Of an SCTP association: its state.
    pub sctp: Option<SctpInfo>,
    /// What the original and the reply direction have carried, where the kernel counts it.
    pub counters: Option<(Counters, Counters)>,
    /// The conntrack zone; 0 unless somebody set up zones.
    pub zone: u16,
    /// The kernel's number for it, which tells it from a later one with the same tuple.
    pub id: Option<u32>,
}

impl Entry {
    /// Whether one of its ends is this address, on either side of a translation.
    pub fn concerns(&self, address: IpAddr) -> bool {
        self.original.source == address || self.reply.source == address
    }

    /// Whether it is over: TCP in time-wait or closed.
    pub fn is_over(&self) -> bool {
        self.tcp
            .is_some_and(|tcp| matches!(tcp.state, TcpState::TimeWait | TcpState::Close))
    }

    /// The family number of its addresses.
    pub(super) fn family(&self) -> u8 {
        family(&self.original)
    }

    /// The entry as the body of a request that inserts it.
    pub(super) fn encode(&self) -> Body {
        let mut body = Body::netfilter(self.family(), 0);
        write_tuple(&mut body, cta::TUPLE_ORIG, &self.original);
        write_tuple(&mut body, cta::TUPLE_REPLY, &self.reply);
        let status = self.status.portable().and(Status::CONFIRMED);
        body.leaf(cta::STATUS, &status.bits().to_be_bytes());
        let seconds = u32::try_from(self.timeout.as_secs()).unwrap_or(u32::MAX);
        // Zero would be forgotten before the first packet comes.
        body.leaf(cta::TIMEOUT, &seconds.max(1).to_be_bytes());
        body.leaf(cta::MARK, &self.mark.bits().to_be_bytes());
        if self.zone != 0 {
            body.leaf(cta::ZONE, &self.zone.to_be_bytes());
        }
        if let Some(tcp) = &self.tcp {
            body.nest(cta::PROTOINFO, |info| {
                info.nest(protoinfo::TCP, |info| {
                    // struct nf_ct_tcp_flags: the flags, and which of them are meant.
                    let flags = |side: TcpSide| {
                        let flags = side.flags & TcpSide::PORTABLE;
                        [flags, flags]
                    };
                    info.leaf(protoinfo::TCP_STATE, &[tcp.state.number()])
                        .leaf(protoinfo::TCP_WSCALE_ORIGINAL, &[tcp.original.window_scale])
                        .leaf(protoinfo::TCP_WSCALE_REPLY, &[tcp.reply.window_scale])
                        .leaf(protoinfo::TCP_FLAGS_ORIGINAL, &flags(tcp.original))
                        .leaf(protoinfo::TCP_FLAGS_REPLY, &flags(tcp.reply));
                });
            });
        }
        if let Some(sctp) = &self.sctp {
            body.nest(cta::PROTOINFO, |info| {
                info.nest(protoinfo::SCTP, |info| {
                    info.leaf(protoinfo::SCTP_STATE, &[sctp.state])
                        .leaf(
                            protoinfo::SCTP_VTAG_ORIGINAL,
                            &sctp.original_tag.to_be_bytes(),
                        )
                        .leaf(protoinfo::SCTP_VTAG_REPLY, &sctp.reply_tag.to_be_bytes());
                });
            });
        }
        body
    }

    /// The entry as the body of a request that inserts it with its translation, which is then fixed,
    /// whatever rule it came from.
    pub(super) fn encode_translated(&self) -> Body {
        let mut untranslated = self.clone();
        // The kernel makes the reply tuple from the translation.
        untranslated.reply = self.original.inverse();
        let mut body = untranslated.encode();
        let (source, destination) = (self.reply.to(), self.reply.from());
        if self.status.has(Status::SOURCE_NAT) {
            write_translation(&mut body, cta::NAT_SRC, source);
        }
        if self.status.has(Status::DESTINATION_NAT) {
            write_translation(&mut body, cta::NAT_DST, destination);
        }
        body
    }

    /// Reads an entry from a message; none if it has not both its tuples.
    pub(super) fn decode(message: &Message<'_>) -> Option<Entry> {
        Entry::decode_body(message.body)
    }

    pub(super) fn decode_body(body: &[u8]) -> Option<Entry> {
        let mut original = None;
        let mut reply = None;
        let mut entry = Entry {
            original: NOWHERE,
            reply: NOWHERE,
            status: Status::default(),
            timeout: Duration::ZERO,
            mark: Mark::NONE,
            tcp: None,
            sctp: None,
            counters: None,
            zone: 0,
            id: None,
        };
        let mut carried = (None, None);
        for attribute in Attributes::after(body, 4) {
            match attribute.kind {
                cta::TUPLE_ORIG => original = read_tuple(&attribute),
                cta::TUPLE_REPLY => reply = read_tuple(&attribute),
                cta::STATUS => entry.status = Status(attribute.be32()?),
                cta::TIMEOUT => entry.timeout = Duration::from_secs(attribute.be32()?.into()),
                cta::MARK => entry.mark = Mark::from_bits(attribute.be32()?),
                cta::ID => entry.id = attribute.be32(),
                cta::ZONE => entry.zone = attribute.be16()?,
                cta::COUNTERS_ORIG => carried.0 = read_counters(&attribute),
                cta::COUNTERS_REPLY => carried.1 = read_counters(&attribute),
                cta::PROTOINFO => {
                    for info in attribute.nested() {
                        match info.kind {
                            protoinfo::TCP => entry.tcp = read_tcp(&info),
                            protoinfo::SCTP => entry.sctp = read_sctp(&info),
                            _ => {}
                        }
                    }
                }
                _ => {}
            }
        }
        entry.original = original?;
        entry.reply = reply?;
        entry.counters = carried.0.zip(carried.1);
        Some(entry)
    }
}

impl fmt::Display for Entry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.original)?;
        if self.reply != self.original.inverse() {
            write!(f, ", answered as {}", self.reply)?;
        }
        Ok(())
    }
}

/// Stands in an entry whose tuples are still being read.
const NOWHERE: Tuple = Tuple {
    source: IpAddr::V4(Ipv4Addr::UNSPECIFIED),
    destination: IpAddr::V4(Ipv4Addr::UNSPECIFIED),
    protocol: Protocol::Other { number: 0 },
};

pub(super) fn family(tuple: &Tuple) -> u8 {
    if tuple.is_ipv6() { AF_INET6 } else { AF_INET }
}

/// Writes a tuple as an attribute.
pub(super) fn write_tuple(body: &mut Body, kind: u16, value: &Tuple) {
    body.nest(kind, |body| {
        body.nest(tuple::IP, |body| {
            for (address, v4, v6) in [
                (value.source, ip::V4_SRC, ip::V6_SRC),
                (value.destination, ip::V4_DST, ip::V6_DST),
            ] {
                match address {
                    IpAddr::V4(a) => body.leaf(v4, &a.octets()),
                    IpAddr::V6(a) => body.leaf(v6, &a.octets()),
                };
            }
        });
        body.nest(tuple::PROTO, |body| {
            body.leaf(proto::NUM, &[value.protocol.number()]);
            match value.protocol {
                Protocol::Tcp {
                    source,
                    destination,
                }
                | Protocol::Udp {
                    source,
                    destination,
                }
                | Protocol::Sctp {
                    source,
                    destination,
                } => {
                    body.leaf(proto::SRC_PORT, &source.to_be_bytes())
                        .leaf(proto::DST_PORT, &destination.to_be_bytes());
                }
                Protocol::Icmp { id, kind, code } => {
                    body.leaf(proto::ICMP_ID, &id.to_be_bytes())
                        .leaf(proto::ICMP_TYPE, &[kind])
                        .leaf(proto::ICMP_CODE, &[code]);
                }
                Protocol::Icmpv6 { id, kind, code } => {
                    body.leaf(proto::ICMPV6_ID, &id.to_be_bytes())
                        .leaf(proto::ICMPV6_TYPE, &[kind])
                        .leaf(proto::ICMPV6_CODE, &[code]);
                }
                Protocol::Other { .. } => {}
            }
        });
    });
}

/// Writes what an address and a port become.
fn write_translation(body: &mut Body, kind: u16, to: SocketAddr) {
    body.nest(kind, |body| {
        match to.ip() {
            IpAddr::V4(a) => body
                .leaf(nat::V4_MINIP, &a.octets())
                .leaf(nat::V4_MAXIP, &a.octets()),
            IpAddr::V6(a) => body
                .leaf(nat::V6_MINIP, &a.octets())
                .leaf(nat::V6_MAXIP, &a.octets()),
        };
        body.nest(nat::PROTO, |body| {
            let port = to.port().to_be_bytes();
            body.leaf(nat::PORT_MIN, &port).leaf(nat::PORT_MAX, &port);
        });
    });
}

fn read_tuple(attribute: &Attribute<'_>) -> Option<Tuple> {
    let (mut source, mut destination, mut protocol) = (None, None, None);
    for part in attribute.nested() {
        match part.kind {
            tuple::IP => {
                for address in part.nested() {
                    let slot = match address.kind {
                        ip::V4_SRC | ip::V6_SRC => &mut source,
                        ip::V4_DST | ip::V6_DST => &mut destination,
                        _ => continue,
                    };
                    *slot = match address.value.len() {
                        4 => <[u8; 4]>::try_from(address.value).ok().map(IpAddr::from),
                        16 => <[u8; 16]>::try_from(address.value)
                            .ok()
                            .map(|a| IpAddr::V6(Ipv6Addr::from(a))),
                        _ => None,
                    };
                }
            }
            tuple::PROTO => protocol = read_protocol(&part),
            _ => {}
        }
    }
    Some(Tuple {
        source: source?,
        destination: destination?,
        protocol: protocol?,
    })
}

fn read_protocol(attribute: &Attribute<'_>) -> Option<Protocol> {
    let (mut number, mut source, mut destination) = (None, 0, 0);
    let (mut id, mut kind, mut code) = (0, 0, 0);
    for part in attribute.nested() {
        match part.kind {
            proto::NUM => number = part.u8(),
            proto::SRC_PORT => source = part.be16()?,
            proto::DST_PORT => destination = part.be16()?,
            proto::ICMP_ID | proto::ICMPV6_ID => id = part.be16()?,
            proto::ICMP_TYPE | proto::ICMPV6_TYPE => kind = part.u8()?,
            proto::ICMP_CODE | proto::ICMPV6_CODE => code = part.u8()?,
            _ => {}
        }
    }
    Some(match number? {
        1 => Protocol::Icmp { id, kind, code },
        6 => Protocol::Tcp {
            source,
            destination,
        },
        17 => Protocol::Udp {
            source,
            destination,
        },
        58 => Protocol::Icmpv6 { id, kind, code },
        132 => Protocol::Sctp {
            source,
            destination,
        },
        number => Protocol::Other { number },
    })
}

fn read_tcp(attribute: &Attribute<'_>) -> Option<TcpInfo> {
    let mut state = None;
    let (mut original, mut reply) = (TcpSide::default(), TcpSide::default());
    for part in attribute.nested() {
        match part.kind {
            protoinfo::TCP_STATE => state = TcpState::from_kernel(part.u8()?),
            protoinfo::TCP_WSCALE_ORIGINAL => original.window_scale = part.u8()?,
            protoinfo::TCP_WSCALE_REPLY => reply.window_scale = part.u8()?,
            protoinfo::TCP_FLAGS_ORIGINAL => original.flags = part.u8()?,
            protoinfo::TCP_FLAGS_REPLY => reply.flags = part.u8()?,
            _ => {}
        }
    }
    Some(TcpInfo {
        state: state?,
        original,
        reply,
    })
}

fn read_sctp(attribute: &Attribute<'_>) -> Option<SctpInfo> {
    let (mut state, mut original_tag, mut reply_tag) = (None, 0, 0);
    for part in attribute.nested() {
        match part.kind {
            protoinfo::SCTP_STATE => state = part.u8(),
            protoinfo::SCTP_VTAG_ORIGINAL => original_tag = part.be32()?,
            protoinfo::SCTP_VTAG_REPLY => reply_tag = part.be32()?,
            _ => {}
        }
    }
    Some(SctpInfo {
        state: state?,
        original_tag,
        reply_tag,
    })
}

fn read_counters(attribute: &Attribute<'_>) -> Option<Counters> {
    let (mut packets, mut bytes) = (None, None);
    for part in attribute.nested() {
        match part.kind {
            counters::PACKETS => packets = part.be64(),
            counters::BYTES => bytes = part.be64(),
            _ => {}
        }
    }
    Some(Counters {
        packets: packets?,
        bytes: bytes?,
    })
}

/// The body of a request that names an entry by its original tuple.
pub(super) fn naming(original: &Tuple, zone: u16) -> Body {
    let mut body = Body::netfilter(family(original), 0);
    write_tuple(&mut body, wire::cta::TUPLE_ORIG, original);
    if zone != 0 {
        body.leaf(cta::ZONE, &zone.to_be_bytes());
    }
    body
}

#[cfg(test)]
pub(super) mod tests {
    use proptest::prelude::*;

    use super::*;

    fn protocols() -> impl Strategy<Value = (Protocol, bool)> {
        let ports = (any::<u16>(), any::<u16>());
        let query = (any::<u16>(), any::<u8>(), any::<u8>());
        prop_oneof![
            (ports, any::<bool>()).prop_map(|((source, destination), v6)| (
                Protocol::Tcp {
                    source,
                    destination
                },
                v6
            )),
            (ports, any::<bool>()).prop_map(|((source, destination), v6)| (
                Protocol::Udp {
                    source,
                    destination
                },
                v6
            )),
            (ports, any::<bool>()).prop_map(|((source, destination), v6)| (
                Protocol::Sctp {
                    source,
                    destination
                },
                v6
            )),
            query.prop_map(|(id, kind, code)| (Protocol::Icmp { id, kind, code }, false)),
            query.prop_map(|(id, kind, code)| (Protocol::Icmpv6 { id, kind, code }, true)),
        ]
    }

    prop_compose! {
        fn tuples()((protocol, v6) in protocols(), a in any::<u128>(), b in any::<u128>()) -> Tuple {
            let address = |bits: u128| if v6 {
                IpAddr::V6(Ipv6Addr::from(bits))
            } else {
                IpAddr::V4(Ipv4Addr::from(bits as u32))
            };
            Tuple { source: address(a), destination: address(b), protocol }
        }
    }

    prop_compose! {
        pub(in crate::conntrack) fn entries()(
            original in tuples(),
            seen in 0u32..4,
            seconds in 1u32..500_000,
            mark in any::<u32>(),
            state in 0u8..10,
            scales in any::<(u8, u8)>(),
            flags in (0u8..16, 0u8..16),
            tags in any::<(u32, u32)>(),
            zone in any::<u16>(),
        ) -> Entry {
            let sides = (
                TcpSide { window_scale: scales.0, flags: flags.0 & TcpSide::PORTABLE },
                TcpSide { window_scale: scales.1, flags: flags.1 & TcpSide::PORTABLE },
            );
            Entry {
                original,
                reply: original.inverse(),
                status: Status((seen << 1) | Status::CONFIRMED.0),
                timeout: Duration::from_secs(seconds.into()),
                mark: Mark::from_bits(mark),
                tcp: matches!(original.protocol, Protocol::Tcp { .. }).then_some(TcpInfo {
                    state: TcpState::ALL[usize::from(state)],
                    original: sides.0,
                    reply: sides.1,
                }),
                sctp: matches!(original.protocol, Protocol::Sctp { .. }).then_some(SctpInfo {
                    state,
                    original_tag: tags.0,
                    reply_tag: tags.1,
                }),
                counters: None,
                zone,
                id: None,
            }
        }
    }

    proptest! {
        #[test]
        fn an_entry_is_read_as_it_was_written(entry in entries()) {
            let body = entry.encode();
            prop_assert_eq!(Entry::decode_body(body.as_bytes()), Some(entry));
        }

        #[test]
        fn an_entry_crosses_the_wire(entry in entries()) {
            let text = serde_json::to_string(&entry).unwrap();
            prop_assert_eq!(serde_json::from_str::<Entry>(&text).unwrap(), entry);
        }

        #[test]
        fn what_is_no_entry_does_no_harm(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            let _ = Entry::decode_body(&bytes);
        }

        #[test]
        fn cut_entries_do_no_harm(entry in entries(), at in 0usize..200) {
            let bytes = Vec::from(entry.encode());
            let _ = Entry::decode_body(&bytes[..at.min(bytes.len())]);
        }

        #[test]
        fn an_answer_to_an_answer_is_the_question(tuple in tuples()) {
            prop_assert_eq!(tuple.inverse().inverse(), tuple);
        }
    }
}
