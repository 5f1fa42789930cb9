//! Two addresses for the two ends of a tunnel that collide with nothing on either host.
//!
//! The ends need addresses for two things only: to be reached when the tunnel is checked, and to be
//! the source of the ICMP errors that a host sends into it. No container and no client ever sees
//! them. They still must not shadow anything, so each host tells the other which networks it knows,
//! and both run the same function over both lists: no third message settles the choice.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnetwork::{IpNetwork, Ipv4Network, Ipv6Network};
use serde::{Deserialize, Serialize};

use super::error::{Error, Result};
use super::key::PublicKey;

/// Where IPv4 pairs come from, in this order of preference: a part of the shared address space
/// (RFC 6598) that is clear of 100.64.0.0/16 and 100.100.100.200, which virtual networks and a
/// cloud's metadata service use; the range for benchmarks (RFC 2544); a private one (RFC 1918).
const POOLS_V4: [(Ipv4Addr, u8); 3] = [
    (Ipv4Addr::new(100, 112, 0, 0), 12),
    (Ipv4Addr::new(198, 18, 0, 0), 15),
    (Ipv4Addr::new(10, 213, 0, 0), 16),
];

/// Where IPv6 pairs come from: a unique local prefix (RFC 4193) that spells `livemig` in ASCII.
const POOL_V6: (Ipv6Addr, u8) = (
    Ipv6Addr::new(0xfd6c, 0x6976, 0x656d, 0x6967, 0, 0, 0, 0),
    64,
);

/// Routes wider than this are ways out, not networks: the default route, and the halves or quarters
/// that VPN clients put in its place.
const WIDEST_NETWORK: u8 = 4;

/// The networks that a host knows, as far as tunnel addresses could collide with them: those of its
/// addresses, its routes and its other hops.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Vec<String>", into = "Vec<String>")]
pub struct Taken(Vec<IpNetwork>);

/// A list of networks that no host of ours sends.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TakenError {
    /// It is longer than any host needs.
    #[error("more than {} networks", Taken::LIMIT)]
    TooMany,
    /// A member of it is not a network.
    #[error(transparent)]
    Network(#[from] ipnetwork::IpNetworkError),
}

impl Taken {
    /// How many networks a list can hold. Only networks that meet a pool count, which are few.
    pub const LIMIT: usize = 1024;

    /// Notes a network, if a tunnel address could collide with it.
    ///
    /// Beyond [`Taken::LIMIT`] the network's whole pool is noted as taken instead: a list that
    /// cannot be complete must not make addresses look free.
    pub fn add(&mut self, network: IpNetwork) {
        let Some(pool) = pools().find(|pool| overlap(*pool, network)) else {
            return;
        };
        if network.prefix() < WIDEST_NETWORK || self.0.contains(&network) {
            return;
        }
        if self.0.len() + pools().count() < Self::LIMIT {
            self.0.push(network);
        } else if !self.0.contains(&pool) {
            self.0.push(pool);
        }
    }

    /// The first of them that shares addresses with `network`.
    pub fn overlapping(&self, network: IpNetwork) -> Option<IpNetwork> {
        self.0.iter().copied().find(|taken| match (taken, network) {
            (IpNetwork::V4(taken), IpNetwork::V4(network)) => taken.overlaps(network),
            (IpNetwork::V6(taken), IpNetwork::V6(network)) => taken.overlaps(network),
            _ => false,
        })
    }

    /// The networks.
    pub fn networks(&self) -> &[IpNetwork] {
        &self.0
    }
}

impl TryFrom<Vec<String>> for Taken {
    type Error = TakenError;

    fn try_from(networks: Vec<String>) -> Result<Self, TakenError> {
        if networks.len() > Self::LIMIT {
            return Err(TakenError::TooMany);
        }
        let networks = networks.iter().map(|text| text.parse());
        Ok(Self(
            networks.collect::<Result<_, ipnetwork::IpNetworkError>>()?,
        ))
    }
}

impl From<Taken> for Vec<String> {
    fn from(taken: Taken) -> Self {
        taken.0.iter().map(ToString::to_string).collect()
    }
}

/// The two tunnel addresses of one family, seen from one host. They are the two addresses of a
/// point-to-point network: a /31 (RFC 3021) or a /127 (RFC 6164).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ends {
    /// This host's address.
    pub local: IpAddr,
    /// The other host's address.
    pub peer: IpAddr,
}

impl Ends {
    /// The length of the prefix that holds exactly the two.
    pub fn prefix(&self) -> u8 {
        if self.local.is_ipv4() { 31 } else { 127 }
    }
}

/// What one host brings to the choice.
#[derive(Debug, Clone, Copy)]
pub struct Party<'a> {
    /// The host's key for this hop.
    pub key: &'a PublicKey,
    /// The networks it knows.
    pub taken: &'a Taken,
    /// Whether it has IPv6 at all.
    pub ipv6: bool,
}

/// The addresses of both ends, seen from `local`: IPv4 and IPv6, each where it can be had.
///
/// A pure function, and symmetric: the other host gets the same pairs the other way round. Where in
/// a pool the search begins follows from the keys, so that hops that are set up at the same moment
/// do not all reach for the first pair.
///
/// # Errors
/// [`Error::Itself`] if both parties have the same key, [`Error::NoAddress`] if there is no pair of
/// either family.
pub fn choose(local: Party<'_>, peer: Party<'_>) -> Result<(Option<Ends>, Option<Ends>)> {
    if local.key == peer.key {
        return Err(Error::Itself);
    }
    let local_is_first = local.key < peer.key;
    let (first, second) = if local_is_first {
        (local.key, peer.key)
    } else {
        (peer.key, local.key)
    };
    let digest = blake3::Hasher::new()
        .update(first.as_bytes())
        .update(second.as_bytes())
        .finalize();
    let mut start = [0; 16];
    start.copy_from_slice(&digest.as_bytes()[..16]);
    let start = u128::from_le_bytes(start);

    let ranges: Vec<(bool, u128, u128)> = [local.taken, peer.taken]
        .into_iter()
        .flat_map(Taken::networks)
        .filter(|network| network.prefix() >= WIDEST_NETWORK)
        .map(|network| {
            (
                network.is_ipv4(),
                number(network.network()),
                number(network.broadcast()),
            )
        })
        .collect();
    let pair = |pool: IpNetwork| {
        let low = free_pair(pool, &ranges, start)?;
        let (even, odd) = (address(pool, low), address(pool, low + 1));
        Some(if local_is_first {
            Ends {
                local: even,
                peer: odd,
            }
        } else {
            Ends {
                local: odd,
                peer: even,
            }
        })
    };
    let v4 = pools().filter(IpNetwork::is_ipv4).find_map(pair);
    let v6 = pools()
        .filter(|pool| pool.is_ipv6() && local.ipv6 && peer.ipv6)
        .find_map(pair);
    if v4.is_none() && v6.is_none() {
        return Err(Error::NoAddress);
    }
    Ok((v4, v6))
}

/// The first of two neighbouring addresses of the pool that no range covers, looked for from
/// `start` on, round and back to it.
fn free_pair(pool: IpNetwork, ranges: &[(bool, u128, u128)], start: u128) -> Option<u128> {
    let base = number(pool.network());
    let pairs = (number(pool.broadcast()) - base).div_ceil(2);
    let mut index = start % pairs;
    let mut passed = 0;
    while passed < pairs {
        let low = base + index * 2;
        let blocker = ranges
            .iter()
            .find(|(v4, from, to)| *v4 == pool.is_ipv4() && *from <= low + 1 && *to >= low);
        let Some((_, _, to)) = blocker else {
            return Some(low);
        };
        // Past the whole range at once: a wide route must not cost a step for each of its pairs.
        let next = (to.saturating_sub(base) / 2 + 1).min(pairs);
        passed += next - index;
        index = next % pairs;
    }
    None
}

fn pools() -> impl Iterator<Item = IpNetwork> {
    // The constants are valid networks; one that were not would simply not be a pool, and the
    // tests would say so.
    POOLS_V4
        .into_iter()
        .filter_map(|(address, prefix)| Ipv4Network::new(address, prefix).ok().map(IpNetwork::V4))
        .chain(
            Ipv6Network::new(POOL_V6.0, POOL_V6.1)
                .ok()
                .map(IpNetwork::V6),
        )
}

fn overlap(one: IpNetwork, other: IpNetwork) -> bool {
    one.is_ipv4() == other.is_ipv4()
        && number(one.network()) <= number(other.broadcast())
        && number(other.network()) <= number(one.broadcast())
}

fn number(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(address) => u32::from(address).into(),
        IpAddr::V6(address) => address.into(),
    }
}

/// The reverse of [`number`], in the family of the pool.
fn address(pool: IpNetwork, number: u128) -> IpAddr {
    match pool {
        // The number lies inside an IPv4 pool, so its upper bits are zero.
        IpNetwork::V4(_) => Ipv4Addr::from(number as u32).into(),
        IpNetwork::V6(_) => Ipv6Addr::from(number).into(),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::key::PrivateKey;
    use super::*;

    fn key() -> PublicKey {
        PrivateKey::generate().unwrap().public()
    }

    fn taken(networks: &[&str]) -> Taken {
        let mut taken = Taken::default();
        for network in networks {
            taken.add(network.parse().unwrap());
        }
        taken
    }

    fn party<'a>(key: &'a PublicKey, taken: &'a Taken) -> Party<'a> {
        Party {
            key,
            taken,
            ipv6: true,
        }
    }

    #[test]
    fn all_pools_are_networks() {
        assert_eq!(pools().count(), POOLS_V4.len() + 1);
        for pool in pools() {
            assert_eq!(pool.ip(), pool.network(), "{pool} has host bits set");
        }
    }

    #[test]
    fn both_hosts_come_to_the_same_pair() {
        let (a, b, none) = (key(), key(), Taken::default());
        let (v4, v6) = choose(party(&a, &none), party(&b, &none)).unwrap();
        let (w4, w6) = choose(party(&b, &none), party(&a, &none)).unwrap();
        for (here, there) in [(v4.unwrap(), w4.unwrap()), (v6.unwrap(), w6.unwrap())] {
            assert_eq!((here.local, here.peer), (there.peer, there.local));
            let network = IpNetwork::new(here.local, here.prefix()).unwrap();
            assert!(network.contains(here.peer));
        }
    }

    #[test]
    fn a_taken_pool_gives_way_to_the_next() {
        let (a, b) = (key(), key());
        let (mine, theirs) = (taken(&["100.64.0.0/10"]), taken(&["198.18.0.0/15"]));
        let (v4, _) = choose(party(&a, &mine), party(&b, &theirs)).unwrap();
        let third = IpNetwork::new(POOLS_V4[2].0.into(), POOLS_V4[2].1).unwrap();
        assert!(third.contains(v4.unwrap().local));

        let all = taken(&["100.64.0.0/10", "198.18.0.0/15", "10.0.0.0/8"]);
        let (v4, v6) = choose(party(&a, &mine), party(&b, &all)).unwrap();
        assert!(v4.is_none() && v6.is_some());
        let without = Party {
            ipv6: false,
            ..party(&b, &all)
        };
        assert!(matches!(
            choose(party(&a, &mine), without),
            Err(Error::NoAddress)
        ));
    }

    #[test]
    fn a_default_route_takes_nothing() {
        assert!(
            taken(&[
                "0.0.0.0/0",
                "0.0.0.0/1",
                "128.0.0.0/1",
                "::/0",
                "192.0.2.0/24"
            ])
            .networks()
            .is_empty()
        );
    }

    #[test]
    fn a_host_makes_no_hop_to_itself() {
        let (a, none) = (key(), Taken::default());
        assert!(matches!(
            choose(party(&a, &none), party(&a, &none)),
            Err(Error::Itself)
        ));
    }

    #[test]
    fn the_only_free_pair_is_found() {
        // All of the last pool but one /31; the others whole.
        let mut networks: Vec<IpNetwork> = vec!["100.112.0.0/12", "198.18.0.0/15"]
            .into_iter()
            .map(|text| text.parse().unwrap())
            .collect();
        // 10.213.0.0/16 without 10.213.77.4/31: the siblings on the way down the tree.
        let hole = u32::from(Ipv4Addr::new(10, 213, 77, 4));
        for prefix in 17..=31 {
            let sibling = (hole ^ (1 << (32 - prefix))) >> (32 - prefix) << (32 - prefix);
            networks.push(IpNetwork::new(Ipv4Addr::from(sibling).into(), prefix).unwrap());
        }
        let full = Taken(networks);
        for _ in 0..32 {
            let (a, b, none) = (key(), key(), Taken::default());
            let (v4, _) = choose(party(&a, &full), party(&b, &none)).unwrap();
            let v4 = v4.unwrap();
            let mut ends = [v4.local, v4.peer];
            ends.sort();
            assert_eq!(
                ends,
                [Ipv4Addr::from(hole), Ipv4Addr::from(hole + 1)].map(IpAddr::from)
            );
        }
    }

    #[test]
    fn an_endless_list_is_refused_and_never_made() {
        let long = vec!["100.112.0.0/31".to_owned(); Taken::LIMIT + 1];
        assert_eq!(Taken::try_from(long.clone()), Err(TakenError::TooMany));
        let wrong = vec!["100.112.0.0/99".to_owned()];
        assert!(matches!(
            Taken::try_from(wrong),
            Err(TakenError::Network(_))
        ));
        let text = serde_json::to_string(&long).unwrap();
        assert!(serde_json::from_str::<Taken>(&text).is_err());

        let mut many = Taken::default();
        for i in 0..5000u32 {
            let address = Ipv4Addr::from(u32::from(POOLS_V4[0].0) + i * 2);
            many.add(IpNetwork::new(address.into(), 31).unwrap());
        }
        assert!(many.networks().len() <= Taken::LIMIT);
        assert!(many.networks().contains(&"100.112.0.0/12".parse().unwrap()));
    }

    fn networks() -> impl Strategy<Value = Vec<IpNetwork>> {
        let v4 = (any::<u32>(), 4u8..=32).prop_map(|(bits, prefix)| {
            // Into or near the pools, where it matters.
            let bits = 0x6440_0000 | (bits & 0x003f_ffff);
            IpNetwork::new(Ipv4Addr::from(bits).into(), prefix).unwrap()
        });
        let v6 = (any::<u64>(), 32u8..=128).prop_map(|(bits, prefix)| {
            let bits = u128::from(POOL_V6.0) | u128::from(bits);
            IpNetwork::new(Ipv6Addr::from(bits).into(), prefix).unwrap()
        });
        proptest::collection::vec(prop_oneof![v4, v6], 0..40)
    }

    proptest! {
        #[test]
        fn chosen_addresses_collide_with_nothing(one in networks(), two in networks(), seed in any::<[u8; 64]>()) {
            let a = PublicKey::try_from(base64(&seed[..32])).unwrap();
            let b = PublicKey::try_from(base64(&seed[32..])).unwrap();
            prop_assume!(a != b);
            let (mut mine, mut theirs) = (Taken::default(), Taken::default());
            one.iter().for_each(|network| mine.add(*network));
            two.iter().for_each(|network| theirs.add(*network));
            let here = choose(party(&a, &mine), party(&b, &theirs));
            let there = choose(party(&b, &theirs), party(&a, &mine));
            let (v4, v6) = here.unwrap();
            let (w4, w6) = there.unwrap();
            prop_assert!(v4.is_some(), "the other pools are free");
            for (ends, mirrored) in [(v4, w4), (v6, w6)] {
                prop_assert_eq!(ends.is_some(), mirrored.is_some());
                let (Some(ends), Some(mirrored)) = (ends, mirrored) else { continue };
                prop_assert_eq!(ends.local, mirrored.peer);
                prop_assert_eq!(ends.peer, mirrored.local);
                let pair = IpNetwork::new(ends.local, ends.prefix()).unwrap();
                prop_assert!(pair.contains(ends.peer));
                for network in one.iter().chain(&two) {
                    prop_assert!(!overlap(pair, *network), "{} meets {}", pair, network);
                }
            }
        }
    }

    fn base64(bytes: &[u8]) -> String {
        use base64::Engine as _;
        base64::engine::general_purpose::STANDARD.encode(bytes)
    }
}
