//! What makes packets take a hop: one routing table per hop, and one rule per family that sends
//! packets with the hop's mark there.
//!
//! The main table is never touched. A packet without a mark of ours is routed as if there were no
//! hop at all.

use std::net::{Ipv4Addr, Ipv6Addr};

use futures::TryStreamExt as _;
use rtnetlink::packet_route::route::{RouteMessage, RouteProtocol};
use rtnetlink::packet_route::rule::{RuleAction, RuleAttribute, RuleMessage};
use rtnetlink::{IpVersion, RouteMessageBuilder};
use rustix::io::Errno;

use super::HopId;
use super::error::Result;
use super::interface::{self, Netlink};

/// Where our rules stand: after the local table (0), before everything that decides by address.
const PRIORITY: u32 = 100;

/// Makes the table and the rules of the hop. What is there already stays.
pub(super) async fn install(netlink: &Netlink, hop: HopId) -> Result<()> {
    let index = netlink.index().await?;
    // Routes first: a rule without them would send marked packets on to the main table.
    netlink
        .request_unless(
            &[Errno::EXIST],
            "add the hop's IPv4 route",
            netlink.handle().route().add(route_v4(hop, index)).execute(),
        )
        .await?;
    if interface::has_ipv6() {
        netlink
            .request_unless(
                &[Errno::EXIST],
                "add the hop's IPv6 route",
                netlink.handle().route().add(route_v6(hop, index)).execute(),
            )
            .await?;
    }
    for version in families() {
        let mut request = netlink.handle().rule().add();
        *request.message_mut() = rule(hop, &version);
        netlink
            .request_unless(&[Errno::EXIST], "add the hop's rule", request.execute())
            .await?;
    }
    Ok(())
}

/// Removes the rules of the hop, every one of them. Its routes go with its interface.
pub(super) async fn remove(netlink: &Netlink, hop: HopId) -> Result<()> {
    for version in families() {
        let rules: Vec<RuleMessage> = netlink
            .request(
                "list the rules",
                netlink.handle().rule().get(version).execute().try_collect(),
            )
            .await?;
        for rule in rules.into_iter().filter(|rule| belongs_to(rule, hop)) {
            netlink
                .request_unless(
                    &[Errno::NOENT],
                    "remove the hop's rule",
                    netlink.handle().rule().del(rule).execute(),
                )
                .await?;
        }
    }
    Ok(())
}

fn families() -> impl Iterator<Item = IpVersion> {
    [IpVersion::V4, IpVersion::V6]
        .into_iter()
        .filter(|version| *version == IpVersion::V4 || interface::has_ipv6())
}

fn route_v4(hop: HopId, index: u32) -> RouteMessage {
    RouteMessageBuilder::<Ipv4Addr>::new()
        .table_id(hop.table())
        .output_interface(index)
        .build()
}

fn route_v6(hop: HopId, index: u32) -> RouteMessage {
    RouteMessageBuilder::<Ipv6Addr>::new()
        .table_id(hop.table())
        .output_interface(index)
        .build()
}

fn rule(hop: HopId, version: &IpVersion) -> RuleMessage {
    let mut rule = RuleMessage::default();
    rule.header.family = match version {
        IpVersion::V4 => rtnetlink::packet_route::AddressFamily::Inet,
        IpVersion::V6 => rtnetlink::packet_route::AddressFamily::Inet6,
    };
    rule.header.action = RuleAction::ToTable;
    rule.attributes = vec![
        RuleAttribute::Priority(PRIORITY),
        RuleAttribute::FwMark(hop.packet_mark()),
        RuleAttribute::FwMask(HopId::PACKET_MARK_MASK),
        RuleAttribute::Table(hop.table()),
        // systemd-networkd removes rules that are not its own whenever it starts, but those of the kernel
        // (`ManageForeignRoutingPolicyRules` in networkd.conf(5)): an update of systemd would stop
        // all connections that take the hop.
        RuleAttribute::Protocol(RouteProtocol::Kernel),
    ];
    rule
}

/// Ours are those that look up the hop's table, whatever else they say.
fn belongs_to(rule: &RuleMessage, hop: HopId) -> bool {
    rule.attributes
        .iter()
        .any(|attribute| matches!(attribute, RuleAttribute::Table(table) if *table == hop.table()))
}
