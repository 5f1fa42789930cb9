//! Networks. A moved container keeps its addresses, so the destination needs a network of the
//! same name with the same subnets.

use std::collections::BTreeMap;
use std::net::IpAddr;

use hyper::Method;
use ipnetwork::IpNetwork;
use podman_api::opts::NetworkListOpts;
use serde::{Deserialize, Serialize};

use super::client::Client;
use super::error::Result;
use super::id::check_name;
use super::inspect::nullable;
use super::request::{Call, Purpose, Query, Upload};

/// A network of a host, with everything that makes another like it. (podman-api's type has no
/// routes and no DNS servers, which is why it is not used here.)
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Network {
    /// Its name.
    pub name: String,
    /// Its ID on this host; not used to create one.
    #[serde(default, skip_serializing)]
    pub id: String,
    /// `bridge`, `macvlan`, `ipvlan`...
    pub driver: String,
    /// The bridge, or the parent interface of another driver. It is the host's own affair and not
    /// used to create one.
    #[serde(default, skip_serializing)]
    pub network_interface: String,
    /// Its subnets.
    #[serde(default, deserialize_with = "nullable")]
    pub subnets: Vec<Subnet>,
    /// Routes that its containers get.
    #[serde(
        default,
        deserialize_with = "nullable",
        skip_serializing_if = "Vec::is_empty"
    )]
    pub routes: Vec<Route>,
    /// Whether it has IPv6.
    #[serde(default)]
    pub ipv6_enabled: bool,
    /// Whether there is no way out of it.
    #[serde(default)]
    pub internal: bool,
    /// Whether its containers can look each other up.
    #[serde(default)]
    pub dns_enabled: bool,
    /// Where its DNS server forwards to.
    #[serde(
        default,
        rename = "network_dns_servers",
        deserialize_with = "nullable",
        skip_serializing_if = "Vec::is_empty"
    )]
    pub dns_servers: Vec<IpAddr>,
    /// Its labels.
    #[serde(default, deserialize_with = "nullable")]
    pub labels: BTreeMap<String, String>,
    /// What its driver was told: `mtu`, `vlan`, `isolate`...
    #[serde(default, deserialize_with = "nullable")]
    pub options: BTreeMap<String, String>,
    /// What hands out its addresses.
    #[serde(default, deserialize_with = "nullable")]
    pub ipam_options: BTreeMap<String, String>,
}

impl Network {
    /// The MTU it was given, in bytes.
    pub fn mtu(&self) -> Option<u16> {
        self.options.get("mtu")?.parse().ok()
    }

    /// Whether a container with this address could be on this network.
    pub fn contains(&self, address: IpAddr) -> bool {
        self.subnets.iter().any(|s| s.subnet.contains(address))
    }
}

/// A subnet of a network.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Subnet {
    /// The addresses.
    #[serde(with = "as_text")]
    pub subnet: IpNetwork,
    /// The host's address in it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gateway: Option<IpAddr>,
    /// Which of the addresses are handed out unasked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lease_range: Option<LeaseRange>,
}

/// A part of a subnet.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeaseRange {
    /// The first address.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub start_ip: Option<IpAddr>,
    /// The last.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub end_ip: Option<IpAddr>,
}

/// A route that the containers of a network get.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Route {
    /// Where to.
    #[serde(with = "as_text")]
    pub destination: IpNetwork,
    /// By which address.
    pub gateway: IpAddr,
    /// Its metric, if it is not the default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub metric: Option<u32>,
}

/// `10.77.0.0/24`: ipnetwork without its serde feature.
mod as_text {
    use ipnetwork::IpNetwork;
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    pub fn serialize<S: Serializer>(
        network: &IpNetwork,
        serializer: S,
    ) -> std::result::Result<S::Ok, S::Error> {
        serializer.collect_str(network)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> std::result::Result<IpNetwork, D::Error> {
        String::deserialize(deserializer)?
            .parse()
            .map_err(D::Error::custom)
    }
}

impl Client {
    /// The network of this name, if there is one.
    ///
    /// # Errors
    /// [`super::Error::Name`] if there can be none; else when Podman cannot be asked.
    pub async fn network(&self, name: &str) -> Result<Option<Network>> {
        check_name("network", name)?;
        let path = format!("/networks/{name}/json");
        let call = self.ask(Purpose::new("inspect", format!("network {name}")), &path);
        match self.socket.send(call, Upload::empty()).await {
            Ok(answer) => answer.json().await.map(Some),
            Err(error) if error.is_not_found() => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// The names of all networks of this host.
    ///
    /// # Errors
    /// When Podman cannot be asked.
    pub async fn networks(&self) -> Result<Vec<String>> {
        let purpose = Purpose::new("list", "networks");
        let networks = self.api.networks();
        let options = NetworkListOpts::default();
        Ok(self
            .api(&purpose, self.timeouts.answer, networks.list(&options))
            .await?
            .into_iter()
            .filter_map(|network| network.name)
            .collect())
    }

    /// Creates a network like this one; the bridge gets a name that is free here.
    ///
    /// # Errors
    /// When there is one of that name, or a subnet is in use here.
    pub async fn create_network(&self, network: &Network) -> Result<()> {
        check_name("network", &network.name)?;
        let purpose = Purpose::new("create", format!("network {}", network.name));
        let body = serde_json::to_value(network).map_err(|e| purpose.malformed(e.to_string()))?;
        let call = Call {
            purpose,
            method: Method::POST,
            path: "/networks/create",
            query: Query::new(),
            wait: self.timeouts.answer,
        };
        self.socket
            .send(call, Upload::json(&body))
            .await?
            .done()
            .await
    }

    /// Removes a network that no container uses. Returns whether there was one.
    ///
    /// # Errors
    /// When a container uses it, or Podman cannot be asked.
    pub async fn remove_network(&self, name: &str) -> Result<bool> {
        check_name("network", name)?;
        let purpose = Purpose::new("remove", format!("network {name}"));
        let network = self.api.networks().get(name);
        let reports = match self
            .api(&purpose, self.timeouts.answer, network.delete())
            .await
        {
            Ok(reports) => reports,
            Err(error) if error.is_not_found() => return Ok(false),
            Err(error) => return Err(error),
        };
        // A network that could not be removed may be told with status 200.
        match reports.into_iter().find_map(|report| report.err) {
            Some(message) => Err(purpose.refused(500, message.clone(), message)),
            None => Ok(true),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As Podman 5.8.6 answered.
    const NET1: &str = r#"{"name":"net1","id":"010f068eff8b2d62f08007f09124038467c05c20c14bd7e154704e77c6eed85f",
        "driver":"bridge","network_interface":"podman1","created":"2026-11-22T20:22:22.871352815Z",
        "subnets":[{"subnet":"10.77.0.0/24","gateway":"10.77.0.1","lease_range":{"start_ip":"10.77.0.129",
        "end_ip":"10.77.0.255"}},{"subnet":"fd77::/64","gateway":"fd77::1"}],"routes":[{"destination":
        "10.99.0.0/16","gateway":"10.77.0.5"}],"ipv6_enabled":true,"internal":false,"dns_enabled":true,
        "network_dns_servers":["1.1.1.1"],"labels":{"a":"b"},"ipam_options":{"driver":"host-local"},
        "containers":{"ace791f8":{"name":"web","interfaces":{}}}}"#;

    #[test]
    fn reads_a_network_and_writes_one_like_it() {
        let network: Network = serde_json::from_str(NET1).unwrap();
        assert_eq!(network.routes[0].gateway.to_string(), "10.77.0.5");
        assert_eq!(network.dns_servers.len(), 1);
        assert!(network.contains("10.77.0.9".parse().unwrap()));
        assert!(network.contains("fd77::3".parse().unwrap()));
        assert!(!network.contains("10.78.0.9".parse().unwrap()));

        let written = serde_json::to_value(&network).unwrap();
        assert_eq!(written.get("id"), None);
        assert_eq!(written.get("network_interface"), None);
        assert_eq!(
            written["subnets"][0]["lease_range"]["start_ip"],
            "10.77.0.129"
        );
        assert_eq!(written["network_dns_servers"][0], "1.1.1.1");
        let again: Network = serde_json::from_value(written).unwrap();
        assert_eq!(again.subnets, network.subnets);
    }
}
