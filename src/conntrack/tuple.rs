//! One direction of a connection: addresses, protocol, ports.

use std::fmt;
use std::net::{IpAddr, SocketAddr};

use serde::{Deserialize, Serialize};

/// A transport protocol with what tells its connections apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    /// TCP.
    Tcp {
        /// The sender's port.
        source: u16,
        /// The receiver's port.
        destination: u16,
    },
    /// UDP.
    Udp {
        /// The sender's port.
        source: u16,
        /// The receiver's port.
        destination: u16,
    },
    /// SCTP.
    Sctp {
        /// The sender's port.
        source: u16,
        /// The receiver's port.
        destination: u16,
    },
    /// ICMP queries, such as echo. (ICMP errors belong to the connection they report on.)
    Icmp {
        /// The identifier of the query.
        id: u16,
        /// The type of the message.
        kind: u8,
        /// Its code.
        code: u8,
    },
    /// ICMPv6 queries.
    Icmpv6 {
        /// The identifier of the query.
        id: u16,
        /// The type of the message.
        kind: u8,
        /// Its code.
        code: u8,
    },
    /// Any other, of which only the number is known. It is seen, but cannot be inserted.
    Other {
        /// The protocol's number.
        number: u8,
    },
}

impl Protocol {
    /// The protocol's number, as in the IP header.
    pub const fn number(&self) -> u8 {
        match self {
            Protocol::Icmp { .. } => 1,
            Protocol::Tcp { .. } => 6,
            Protocol::Udp { .. } => 17,
            Protocol::Icmpv6 { .. } => 58,
            Protocol::Sctp { .. } => 132,
            Protocol::Other { number } => *number,
        }
    }

    /// Its name in lower case, as conntrack-tools print it.
    pub const fn name(&self) -> &'static str {
        match self {
            Protocol::Tcp { .. } => "tcp",
            Protocol::Udp { .. } => "udp",
            Protocol::Sctp { .. } => "sctp",
            Protocol::Icmp { .. } => "icmp",
            Protocol::Icmpv6 { .. } => "icmpv6",
            Protocol::Other { .. } => "other",
        }
    }

    /// The sender's and the receiver's port, of a protocol that has ports.
    pub const fn ports(&self) -> Option<(u16, u16)> {
        match self {
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
            } => Some((*source, *destination)),
            _ => None,
        }
    }

    /// How a packet that answers this one looks.
    #[must_use]
    pub const fn inverse(self) -> Protocol {
        match self {
            Protocol::Tcp {
                source,
                destination,
            } => Protocol::Tcp {
                source: destination,
                destination: source,
            },
            Protocol::Udp {
                source,
                destination,
            } => Protocol::Udp {
                source: destination,
                destination: source,
            },
            Protocol::Sctp {
                source,
                destination,
            } => Protocol::Sctp {
                source: destination,
                destination: source,
            },
            // RFC 792 and RFC 950: echo, timestamp, information, address mask.
            Protocol::Icmp { id, kind, code } => Protocol::Icmp {
                id,
                kind: match kind {
                    0 => 8,
                    8 => 0,
                    13 => 14,
                    14 => 13,
                    15 => 16,
                    16 => 15,
                    17 => 18,
                    18 => 17,
                    other => other,
                },
                code,
            },
            // RFC 4443 and RFC 4620: echo, node information.
            Protocol::Icmpv6 { id, kind, code } => Protocol::Icmpv6 {
                id,
                kind: match kind {
                    128 => 129,
                    129 => 128,
                    139 => 140,
                    140 => 139,
                    other => other,
                },
                code,
            },
            other @ Protocol::Other { .. } => other,
        }
    }
}

/// One direction of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Tuple {
    /// Who sends.
    pub source: IpAddr,
    /// Who receives.
    pub destination: IpAddr,
    /// The protocol, with its ports.
    pub protocol: Protocol,
}

impl Tuple {
    /// The direction of the answers, where nothing is translated.
    #[must_use]
    pub const fn inverse(self) -> Tuple {
        Tuple {
            source: self.destination,
            destination: self.source,
            protocol: self.protocol.inverse(),
        }
    }

    /// Whether it is IPv6.
    pub const fn is_ipv6(&self) -> bool {
        self.source.is_ipv6()
    }

    /// The sender, with its port (0 for protocols without).
    pub fn from(&self) -> SocketAddr {
        SocketAddr::new(self.source, self.protocol.ports().map_or(0, |p| p.0))
    }

    /// The receiver, with its port (0 for protocols without).
    pub fn to(&self) -> SocketAddr {
        SocketAddr::new(self.destination, self.protocol.ports().map_or(0, |p| p.1))
    }

    /// The arguments with which conntrack-tools mean this tuple.
    pub(crate) fn as_conntrack_arguments(&self) -> String {
        let ports = self
            .protocol
            .ports()
            .map_or(String::new(), |(source, destination)| {
                format!(" --sport {source} --dport {destination}")
            });
        format!(
            "-p {} -s {} -d {}{ports}",
            self.protocol.name(),
            self.source,
            self.destination
        )
    }
}

impl fmt::Display for Tuple {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.protocol {
            Protocol::Icmp { id, .. } | Protocol::Icmpv6 { id, .. } => write!(
                f,
                "{} {} → {} (id {id})",
                self.protocol.name(),
                self.source,
                self.destination
            ),
            Protocol::Other { number } => write!(
                f,
                "protocol {number} {} → {}",
                self.source, self.destination
            ),
            _ => write!(
                f,
                "{} {} → {}",
                self.protocol.name(),
                self.from(),
                self.to()
            ),
        }
    }
}
