//! Readers of what another host says.

use std::net::IpAddr;
use std::sync::LazyLock;

use serde::Serialize;
use serde::de::DeserializeOwned;

use super::choice;
use crate::agent::protocol::{
    Assessment, Expect, Flows, Forget, Held, Introduction, Offer, Open, Opened, Prepare, Prepared,
    Running, Shorten, Shortened, Status, Switch, Switched, Undone,
};
use crate::agent::{Address, Fingerprint, PeerName, Token};
use crate::bundle::vetted::{CONFIG_DUMP, Documents, SPEC_DUMP};
use crate::conntrack::Mark;
use crate::criu::Side;
use crate::migration::{Agreed, Policy, Privilege, forbidden};
use crate::podman::{Container, HostInfo};
use crate::tunnel::{self, HopId, Party};

/// Every message of the protocol.
pub fn protocol(input: &[u8]) {
    let (which, json) = choice(input);
    match which % 18 {
        0 => drop(read::<Offer>(json).inspect(offer)),
        1 => drop(read::<Prepare>(json).inspect(|prepare| {
            offer(&prepare.offer);
            hop(&prepare.hop);
        })),
        2 => drop(read::<Flows>(json).inspect(flows)),
        3 => drop(read::<Assessment>(json)),
        4 => drop(read::<Prepared>(json).inspect(|prepared| hop(&prepared.hop))),
        5 => drop(read::<Running>(json)),
        6 => drop(read::<Introduction>(json)),
        7 => drop(read::<Expect>(json)),
        8 => drop(read::<Shorten>(json)),
        9 => drop(read::<Shortened>(json)),
        10 => drop(read::<Forget>(json)),
        11 => drop(read::<Open>(json).inspect(|open| hop(&open.hop))),
        12 => drop(read::<Opened>(json).inspect(|opened| hop(&opened.hop))),
        13 => drop(read::<Switch>(json)),
        14 => drop(read::<Switched>(json)),
        15 => drop(read::<Status>(json)),
        16 => drop(read::<Undone>(json)),
        _ => drop(read::<Held>(json)),
    }
}

/// Reads a message. What was read is written and read again, and is the same.
pub(crate) fn read<T: DeserializeOwned + Serialize>(json: &[u8]) -> Option<T> {
    let message: T = serde_json::from_slice(json).ok()?;
    let text = serde_json::to_vec(&message).expect("what was read can be written");
    let again: T = serde_json::from_slice(&text).expect("and read again");
    let again = serde_json::to_vec(&again).expect("and written again");
    assert_eq!(text, again);
    Some(message)
}

fn offer(offer: &Offer) {
    let container = &offer.container;
    let _ = forbidden(&Policy::default(), container, &offer.host);
    let _ = crate::criu::check::host(Side::Source, &offer.features, &container.runtime);
    let _ = crate::criu::check::pair(&offer.features, &offer.features, "runc", "crun");
    let _: Vec<IpAddr> = container.addresses().collect();
    let _ = container.volumes().count();
    for port in &container.ports {
        assert!(port.collides_with(port) || port.range == 0);
    }
}

/// Addresses are chosen by both ends, and both have to come to the same.
fn hop(theirs: &tunnel::Proposal) {
    let taken = tunnel::Taken::default();
    let own: tunnel::PublicKey = serde_json::from_value(serde_json::Value::String(
        "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=".to_owned(),
    ))
    .expect("a key");
    let here = Party {
        key: &own,
        taken: &taken,
        ipv6: true,
    };
    let there = Party {
        key: &theirs.public_key,
        taken: &theirs.taken,
        ipv6: theirs.ipv6,
    };
    let (here, there) = (tunnel::choose(here, there), tunnel::choose(there, here));
    match (here, there) {
        (Ok(here), Ok(there)) => {
            let turned = |ends: Option<tunnel::Ends>| {
                ends.map(|ends| tunnel::Ends {
                    local: ends.peer,
                    peer: ends.local,
                })
            };
            assert_eq!(here, (turned(there.0), turned(there.1)));
        }
        (Err(_), Err(_)) => {}
        other => panic!("one end finds addresses: {other:?}"),
    }
}

/// What becomes of the connections of another host.
pub(crate) fn flows(flows: &Flows) {
    let hop = HopId::MAX;
    for flow in &flows.flows {
        let _ = (flow.peer(), flow.keepable(&[]), flow.is_tied_to_interface());
        let _ = (flow.came_by(), flow.goes_by(), flow.answering(hop));
        let (_, mark, mask) = flow.steered(Some(hop));
        assert_eq!(mark.bits() & !mask.bits(), 0);
        let entry = flow.at_destination(hop);
        assert_ne!(entry.mark, Mark::NONE);
        crate::conntrack::fuzzing::written(&entry);
    }
}

/// What a container is, said twice: by the offer and by the documents in its archive.
pub fn documents(input: &[u8]) {
    let (how, text) = choice(input);
    let (config, spec) = match text.iter().position(|byte| *byte == 0) {
        Some(end) => (&text[..end], &text[end + 1..]),
        None => (text, &b"{}"[..]),
    };
    let policy = Policy {
        allowed: match how & 1 {
            0 => Default::default(),
            _ => Privilege::ALL.into_iter().collect(),
        },
        binds: Vec::new(),
    };
    let (container, host) = agreed_container();
    let agreed = Agreed {
        container,
        policy: &policy,
        host,
    };
    let documents = Documents::of(&[(CONFIG_DUMP, config), (SPEC_DUMP, spec)]);
    if agreed.judge(&documents).is_ok() && how & 1 == 0 {
        // No program of the host's, whatever else it says.
        for text in [config, spec] {
            let value: serde_json::Value = serde_json::from_slice(text).expect("JSON");
            let hook = |name: &str| {
                let fields = value.as_object().into_iter().flatten();
                fields
                    .filter(|(key, _)| key.eq_ignore_ascii_case(name))
                    .any(|(_, value)| {
                        !(value.is_null()
                            || value.as_array().is_some_and(Vec::is_empty)
                            || value.as_object().is_some_and(serde_json::Map::is_empty)
                            || value == ""
                            || value == false
                            || value == 0)
                    })
            };
            assert!(!hook("exitCommand") && !hook("hooks"), "{value}");
        }
    }
}

/// The container that was offered, and the host that it comes to.
fn agreed_container() -> &'static (Container, HostInfo) {
    static OFFERED: LazyLock<(Container, HostInfo)> = LazyLock::new(|| {
        crate::podman::fuzzing::offered(include_str!("../migration/testdata/inspect.json"))
    });
    &OFFERED
}

/// Invitations, and names of hosts. A token is printed as it was read.
pub fn token(input: &[u8]) {
    let (which, text) = choice(input);
    let Ok(text) = std::str::from_utf8(text) else {
        return;
    };
    match which % 4 {
        0 => printed_again::<Token>(text),
        1 => printed_again::<Address>(text),
        2 => printed_again::<PeerName>(text),
        _ => printed_again::<Fingerprint>(text),
    }
}

fn printed_again<T: std::str::FromStr + std::fmt::Display>(text: &str) {
    if let Ok(read) = text.parse::<T>() {
        let printed = read.to_string();
        let again = printed.parse::<T>().ok();
        let again = again.expect("what is printed can be read").to_string();
        assert_eq!(printed, again);
    }
}
