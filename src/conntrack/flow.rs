//! A connection as its container sees it, and what each host has to do so that it goes on.
//!
//! Inside the container a connection has two ends, the container's and the peer's, with no
//! translation between them: the same on every host. That pair is what moves. Around it,
//!
//! | opened by | at the host it began at | as the container sees it |
//! | --- | --- | --- |
//! | the peer, through a published port | peer → host, answered by the container | peer → container |
//! | the container, masqueraded | container → peer, answered to the host | container → peer |
//! | either, arriving through a hop from an earlier host | no translation | the same |

use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use super::{Direction, Entry, Mark, Status, TcpInfo, Tuple};
use crate::podman::Subnet;
use crate::tunnel::HopId;

/// Who sent the first packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Opening {
    /// The peer: a client of the container.
    Inbound,
    /// The container: a client of the peer.
    Outbound,
}

/// Why a connection cannot follow its container.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, thiserror::Error)]
#[serde(rename_all = "kebab-case")]
pub enum CannotKeep {
    /// The peer, as the container sees it, is on the container's own network: it reaches the
    /// container's address without the host, and the container it. (The network's gateway is not
    /// meant, which stands there for programs on the host and for other containers that go through
    /// a published port and are masqueraded: see [`alias`](super::alias).)
    ///
    /// Answering for the absent one's address on each bridge (a neighbour proxy) could carry such
    /// connections, and is not sound: at either host, Podman believes the other's address to be free
    /// and gives it to the next container that starts.
    #[error("its peer is on the container's own network")]
    PeerOnBridge,
    /// Both ends are the container.
    #[error("the container talks to itself through its host")]
    PeerIsItself,
    /// The host has no way to hand over connections of this protocol.
    #[error("connections of this protocol cannot be handed over")]
    Protocol,
}

/// A connection of a container.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Flow {
    /// Who opened it.
    pub opening: Opening,
    /// The container's address.
    pub container: IpAddr,
    /// The direction of the first packet as the container sees it, without translation.
    pub seen: Tuple,
    /// The entry of the host this was read from: the one whose mark steers it there.
    pub entry: Entry,
}

impl Entry {
    /// This entry as a connection of the container with this address; none if it is none of its.
    pub fn flow_of(&self, container: IpAddr) -> Option<Flow> {
        // A connection from the container to itself through its host answers to both; the
        // container then is the client too, and `keepable` tells.
        let (opening, seen) = if self.original.source == container {
            (Opening::Outbound, self.original)
        } else if self.reply.source == container {
            (Opening::Inbound, self.reply.inverse())
        } else {
            return None;
        };
        Some(Flow {
            opening,
            container,
            seen,
            entry: self.clone(),
        })
    }
}

impl Flow {
    /// The peer's address, as the container sees it.
    pub fn peer(&self) -> IpAddr {
        match self.opening {
            Opening::Inbound => self.seen.source,
            Opening::Outbound => self.seen.destination,
        }
    }

    /// Whether the connection can follow the container, whose networks' subnets are given.
    pub fn keepable(&self, subnets: &[Subnet]) -> Result<(), CannotKeep> {
        if self.peer() == self.container
            || (self.entry.original.source == self.container
                && self.entry.reply.source == self.container)
        {
            return Err(CannotKeep::PeerIsItself);
        }
        let peer = self.peer();
        let direct = |subnet: &Subnet| subnet.subnet.contains(peer) && subnet.gateway != Some(peer);
        if subnets.iter().any(direct) {
            return Err(CannotKeep::PeerOnBridge);
        }
        if matches!(self.seen.protocol, super::Protocol::Other { .. }) {
            return Err(CannotKeep::Protocol);
        }
        Ok(())
    }

    /// Whether the kernel forgets the connection when its packets begin to take a hop: its source
    /// is translated, as a rule by `masquerade`, which ties it to the bridge that its packets leave
    /// by. See [`Table::pin_all`](super::Table::pin_all).
    ///
    /// A connection that the container opened keeps its way out.
    pub fn is_tied_to_interface(&self) -> bool {
        self.opening == Opening::Inbound && self.entry.status.has(Status::SOURCE_NAT)
    }

    /// The direction of the packets that go to the container.
    pub fn towards_container(&self) -> Direction {
        match self.opening {
            Opening::Inbound => Direction::Original,
            Opening::Outbound => Direction::Reply,
        }
    }

    /// The hop by which it came to this host; none if it began here.
    pub fn came_by(&self) -> Option<HopId> {
        self.entry.mark.hop(self.towards_container().opposite())
    }

    /// The hop by which it goes on to the container; none if that is on this host.
    pub fn goes_by(&self) -> Option<HopId> {
        self.entry.mark.hop(self.towards_container())
    }

    /// The bits that send its packets to the container through a hop, and the bits to change, for
    /// the entry of the host that the container leaves. Without a hop: that take it back home.
    ///
    /// Only the direction towards the container is touched, so a host in the middle of a chain
    /// goes on sending the other direction to where the connection came from.
    pub fn steering(&self, hop: Option<HopId>) -> (Mark, Mark) {
        let direction = self.towards_container();
        (
            hop.map_or(Mark::NONE, |hop| Mark::to(direction, hop)),
            Mark::mask(direction),
        )
    }

    /// The same as what marks its entry: the entry, the bits and which of them to change.
    pub fn steered(&self, hop: Option<HopId>) -> (Tuple, Mark, Mark) {
        let (mark, mask) = self.steering(hop);
        (self.entry.original, mark, mask)
    }

    /// What marks its entry at the container's host so that the container's packets go by another
    /// hop: the entry, the bits and which of them to change.
    pub fn answering(&self, hop: HopId) -> (Tuple, Mark, Mark) {
        let back = self.towards_container().opposite();
        (self.entry.original, Mark::to(back, hop), Mark::mask(back))
    }

    /// The entry that the destination's kernel has to know before the container runs there, where
    /// `hop` is the destination's number of the hop that leads back.
    ///
    /// Nothing is translated in it, packets from the container go back through the hop, and TCP
    /// packets are not measured against a window that this kernel has never seen.
    pub fn at_destination(&self, hop: HopId) -> Entry {
        let back = self.towards_container().opposite();
        Entry {
            original: self.seen,
            reply: self.seen.inverse(),
            status: self.entry.status.portable(),
            timeout: self.entry.timeout,
            mark: Mark::to(back, hop),
            tcp: self.entry.tcp.map(TcpInfo::liberal),
            sctp: self.entry.sctp,
            counters: None,
            zone: 0,
            id: None,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use proptest::prelude::*;

    use super::super::{Protocol, TcpSide, TcpState};
    use super::*;

    fn tuple(source: &str, sport: u16, destination: &str, dport: u16) -> Tuple {
        Tuple {
            source: source.parse().unwrap(),
            destination: destination.parse().unwrap(),
            protocol: Protocol::Tcp {
                source: sport,
                destination: dport,
            },
        }
    }

    fn entry(original: Tuple, reply: Tuple) -> Entry {
        Entry {
            original,
            reply,
            status: Status::PORTABLE
                .and(Status::DESTINATION_NAT)
                .and(Status::SOURCE_NAT),
            timeout: Duration::from_secs(100),
            mark: Mark::from_bits(0x2000),
            tcp: Some(TcpInfo {
                state: TcpState::Established,
                original: TcpSide {
                    window_scale: 7,
                    flags: 0x23,
                },
                reply: TcpSide::default(),
            }),
            sctp: None,
            counters: None,
            zone: 0,
            id: Some(7),
        }
    }

    fn subnet() -> Subnet {
        Subnet {
            subnet: "10.88.0.0/16".parse().unwrap(),
            gateway: Some("10.88.0.1".parse().unwrap()),
            lease_range: None,
        }
    }

    fn container() -> IpAddr {
        "10.88.0.5".parse().unwrap()
    }

    #[test]
    fn a_published_port_is_inbound_and_untranslated_at_the_destination() {
        let entry = entry(
            tuple("192.0.2.9", 40000, "198.51.100.1", 8080),
            tuple("10.88.0.5", 80, "192.0.2.9", 40000),
        );
        let flow = entry.flow_of(container()).unwrap();
        assert_eq!(flow.opening, Opening::Inbound);
        assert_eq!(flow.seen, tuple("192.0.2.9", 40000, "10.88.0.5", 80));
        assert_eq!(flow.keepable(&[subnet()]), Ok(()));
        let hop = HopId::try_from(4).unwrap();
        assert_eq!(
            flow.steering(Some(hop)),
            (Mark::from_bits(0x0400_0000), Mark::from_bits(0xff00_0000))
        );
        assert_eq!(flow.steering(None).0, Mark::NONE);
        let there = flow.at_destination(hop);
        assert_eq!(there.mark.bits(), 0x0004_0000);
        assert_eq!(there.reply, tuple("10.88.0.5", 80, "192.0.2.9", 40000));
        assert_eq!(there.status, Status::PORTABLE);
        assert_eq!(there.tcp.unwrap().original.flags, 0x0b);
        assert_eq!(there.tcp.unwrap().reply.flags, TcpSide::BE_LIBERAL);
    }

    #[test]
    fn a_masqueraded_connection_is_outbound() {
        let entry = entry(
            tuple("10.88.0.5", 50000, "192.0.2.9", 5432),
            tuple("192.0.2.9", 5432, "198.51.100.1", 50000),
        );
        let flow = entry.flow_of(container()).unwrap();
        assert_eq!(flow.opening, Opening::Outbound);
        assert_eq!(flow.peer(), "192.0.2.9".parse::<IpAddr>().unwrap());
        let hop = HopId::try_from(4).unwrap();
        assert_eq!(flow.steering(Some(hop)).0.bits(), 0x0004_0000);
        let there = flow.at_destination(hop);
        assert_eq!(there.mark.bits(), 0x0400_0000);
        assert_eq!(there.reply, tuple("192.0.2.9", 5432, "10.88.0.5", 50000));
    }

    #[test]
    fn in_a_chain_only_the_way_to_the_container_changes() {
        let came_by = HopId::try_from(1).unwrap();
        let goes_by = HopId::try_from(2).unwrap();
        let mut middle = entry(
            tuple("192.0.2.9", 40000, "10.88.0.5", 80),
            tuple("10.88.0.5", 80, "192.0.2.9", 40000),
        );
        middle.mark = Mark::to(Direction::Reply, came_by);
        let (mark, mask) = middle.flow_of(container()).unwrap().steering(Some(goes_by));
        let after = middle.mark.with(mark, mask);
        assert_eq!(after.hop(Direction::Original), Some(goes_by));
        assert_eq!(after.hop(Direction::Reply), Some(came_by));
    }

    #[test]
    fn peers_on_the_bridge_are_told_apart() {
        let keepable = |entry: &Entry| entry.flow_of(container()).unwrap().keepable(&[subnet()]);
        // A program on the host, through the published port: seen as the bridge's address.
        let local = entry(
            tuple("127.0.0.1", 40000, "127.0.0.1", 8080),
            tuple("10.88.0.5", 80, "10.88.0.1", 40000),
        );
        assert_eq!(keepable(&local), Ok(()));
        let direct = entry(
            tuple("10.88.0.7", 40000, "10.88.0.5", 80),
            tuple("10.88.0.5", 80, "10.88.0.7", 40000),
        );
        assert_eq!(keepable(&direct), Err(CannotKeep::PeerOnBridge));
        let itself = entry(
            tuple("10.88.0.5", 40000, "198.51.100.1", 8080),
            tuple("10.88.0.5", 80, "10.88.0.1", 40000),
        );
        assert_eq!(keepable(&itself), Err(CannotKeep::PeerIsItself));
        assert_eq!(local.flow_of("10.88.0.6".parse().unwrap()), None);
    }

    proptest! {
        #[test]
        fn an_entry_at_the_destination_is_the_same_flow(entry in super::super::entry::tests::entries()) {
            let hop = HopId::try_from(9).unwrap();
            let flow = entry.flow_of(entry.reply.source).unwrap();
            let there = flow.at_destination(hop);
            let again = there.flow_of(entry.reply.source).unwrap();
            prop_assert_eq!(&again.seen, &flow.seen);
            prop_assert_eq!(again.opening, flow.opening);
            // Going through one more host changes nothing but the marks.
            prop_assert_eq!(again.at_destination(hop), there);
        }
    }
}
