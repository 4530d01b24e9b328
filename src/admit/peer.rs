//! Callers with a certificate: what they are called, and what the configuration lets them do.
//!
//! ```text
//! leaf certificate ─▶ uri:spiffe://prod/ci · dns:ci.example.com · cn:alice ─▶ Clients ─▶ Principal
//! ```
//!
//! The certificate was checked against the CA before it comes here (`transport::tls`); this only
//! reads names out of it. The kind stands before the name, so that no CA's free choice of a common
//! name passes for a SPIFFE id.

use std::collections::HashMap;
use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use super::{Grant, ModelPatterns, PatternError, Principal, Role, RoleError};

/// Longest name that is looked at.
const NAME_BYTES_MAX: usize = 256;
/// Clients that the configuration names.
const CLIENTS_MAX: usize = 1024;

/// Who a certificate was made for.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct PeerName(Arc<str>);

impl PeerName {
    /// The URI among the leaf certificate's alternative names; without one the DNS name; without
    /// either the subject's common name. `None` when there is none of them, or several of the kind:
    /// which of them is meant is not for us to guess.
    pub fn of(certificate: &[u8]) -> Option<Self> {
        let names = names(certificate)?;
        let (kind, found) = [("uri", names.uris), ("dns", names.dns), ("cn", names.common)]
            .into_iter()
            .find(|(_, found)| !found.is_empty())?;
        let [name] = found[..] else { return None };
        let name = std::str::from_utf8(name).ok()?;
        let visible = |char: char| !char.is_control() && !char.is_whitespace();
        let right = name.len() <= NAME_BYTES_MAX && !name.is_empty() && name.chars().all(visible);
        right.then(|| Self(format!("{kind}:{name}").into()))
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for PeerName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// What clients with a certificate may do: `uri:spiffe://prod/ci = deployer fraud-*; cn:alice =
/// admin`.
#[derive(Clone, Debug, Default)]
pub struct Clients(HashMap<String, Vec<Grant>>);

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ClientsError {
    #[error("expected 'NAME = ROLE [MODELS…]' between semicolons, got '{0}'")]
    Form(String),
    #[error("expected a name that begins with uri:, dns: or cn:, got '{0}'")]
    Name(String),
    #[error(transparent)]
    Role(#[from] RoleError),
    #[error(transparent)]
    Pattern(#[from] PatternError),
    #[error("there are more than {CLIENTS_MAX} clients")]
    TooMany,
}

impl FromStr for Clients {
    type Err = ClientsError;

    fn from_str(text: &str) -> Result<Self, ClientsError> {
        let mut clients: HashMap<String, Vec<Grant>> = HashMap::new();
        for entry in text.split(';').map(str::trim).filter(|entry| !entry.is_empty()) {
            let form = || ClientsError::Form(entry.to_owned());
            // The last one: a URI may hold others.
            let (name, grant) = entry.rsplit_once('=').ok_or_else(form)?;
            let name = name.trim();
            let known = ["uri:", "dns:", "cn:"]
                .iter()
                .any(|kind| name.strip_prefix(kind).is_some_and(|rest| !rest.is_empty()));
            if !known || name.contains(char::is_whitespace) {
                return Err(ClientsError::Name(name.to_owned()));
            }
            let mut words = grant.split_whitespace();
            let role: Role = words.next().ok_or_else(form)?.parse()?;
            let models = ModelPatterns::parse(&words.collect::<Vec<_>>())?;
            clients.entry(name.to_owned()).or_default().push(Grant { role, models });
            if clients.len() > CLIENTS_MAX {
                return Err(ClientsError::TooMany);
            }
        }
        Ok(Self(clients))
    }
}

impl Clients {
    /// `None` for whom the configuration does not name.
    pub fn identify(&self, name: &PeerName) -> Option<Principal> {
        let grants = self.0.get(name.as_str())?.clone();
        Some(Principal { name: Arc::clone(&name.0), grants })
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

#[derive(Default)]
struct Names<'a> {
    uris: Vec<&'a [u8]>,
    dns: Vec<&'a [u8]>,
    common: Vec<&'a [u8]>,
}

/// Tags of DER.
mod tag {
    pub(super) const INTEGER: u8 = 0x02;
    pub(super) const OCTETS: u8 = 0x04;
    pub(super) const OID: u8 = 0x06;
    pub(super) const UTF8: u8 = 0x0c;
    pub(super) const PRINTABLE: u8 = 0x13;
    pub(super) const SEQUENCE: u8 = 0x30;
    pub(super) const SET: u8 = 0x31;
    /// `GeneralName`: dNSName, uniformResourceIdentifier.
    pub(super) const DNS: u8 = 0x82;
    pub(super) const URI: u8 = 0x86;
    /// `TBSCertificate`: version, extensions.
    pub(super) const VERSION: u8 = 0xa0;
    pub(super) const EXTENSIONS: u8 = 0xa3;
}

const SUBJECT_ALT_NAME: &[u8] = &[0x55, 0x1d, 0x11];
const COMMON_NAME: &[u8] = &[0x55, 0x04, 0x03];

/// Values of DER, one after the other.
struct Der<'a>(&'a [u8]);

impl<'a> Der<'a> {
    fn next(&mut self) -> Option<(u8, &'a [u8])> {
        let (&[tag, first], rest) = self.0.split_first_chunk()?;
        let (len, rest) = match first {
            0..=0x7f => (usize::from(first), rest),
            // Up to four bytes of length; certificates are no longer.
            0x81..=0x84 => {
                let (digits, rest) = rest.split_at_checked(usize::from(first & 0x7f))?;
                (digits.iter().fold(0, |len, byte| len << 8 | usize::from(*byte)), rest)
            }
            _ => return None,
        };
        let (value, rest) = rest.split_at_checked(len)?;
        self.0 = rest;
        Some((tag, value))
    }

    /// The next value, which has to have this tag.
    fn expect(&mut self, expected: u8) -> Option<&'a [u8]> {
        self.next().filter(|(tag, _)| *tag == expected).map(|(_, value)| value)
    }
}

/// The names in a certificate (RFC 5280, section 4.1); `None` for what is none.
fn names(certificate: &[u8]) -> Option<Names<'_>> {
    let whole = Der(certificate).expect(tag::SEQUENCE)?;
    let mut fields = Der(Der(whole).expect(tag::SEQUENCE)?);
    let (first, _) = fields.next()?;
    if first == tag::VERSION {
        fields.expect(tag::INTEGER)?;
    }
    fields.expect(tag::SEQUENCE)?; // signature algorithm
    fields.expect(tag::SEQUENCE)?; // issuer
    fields.expect(tag::SEQUENCE)?; // validity
    let subject = fields.expect(tag::SEQUENCE)?;
    let mut found = Names::default();
    common_names(subject, &mut found)?;
    fields.expect(tag::SEQUENCE)?; // public key
    while let Some((kind, value)) = fields.next() {
        if kind == tag::EXTENSIONS {
            extensions(Der(value).expect(tag::SEQUENCE)?, &mut found)?;
        }
    }
    fields.0.is_empty().then_some(found)
}

fn common_names<'a>(subject: &'a [u8], found: &mut Names<'a>) -> Option<()> {
    let mut sets = Der(subject);
    while !sets.0.is_empty() {
        let mut attributes = Der(sets.expect(tag::SET)?);
        while !attributes.0.is_empty() {
            let mut attribute = Der(attributes.expect(tag::SEQUENCE)?);
            let is_common = attribute.expect(tag::OID)? == COMMON_NAME;
            let (kind, value) = attribute.next()?;
            if is_common {
                // Other kinds of text have no one reading as UTF-8.
                matches!(kind, tag::UTF8 | tag::PRINTABLE).then_some(())?;
                found.common.push(value);
            }
        }
    }
    Some(())
}

fn extensions<'a>(list: &'a [u8], found: &mut Names<'a>) -> Option<()> {
    let mut extensions = Der(list);
    while !extensions.0.is_empty() {
        let mut extension = Der(extensions.expect(tag::SEQUENCE)?);
        if extension.expect(tag::OID)? != SUBJECT_ALT_NAME {
            continue;
        }
        let (mut kind, mut value) = extension.next()?;
        if kind != tag::OCTETS {
            // Whether it is critical comes first, if it is said.
            (kind, value) = extension.next()?;
        }
        (kind == tag::OCTETS).then_some(())?;
        let mut general = Der(Der(value).expect(tag::SEQUENCE)?);
        while !general.0.is_empty() {
            match general.next()? {
                (tag::URI, name) => found.uris.push(name),
                (tag::DNS, name) => found.dns.push(name),
                _ => {}
            }
        }
    }
    Some(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rcgen::{CertificateParams, DnType, KeyPair, SanType};

    use super::*;
    use crate::admit::Action;

    fn certificate(common: &[&str], names: Vec<SanType>) -> Vec<u8> {
        let mut params = CertificateParams::default();
        params.distinguished_name = rcgen::DistinguishedName::new();
        params.distinguished_name.push(DnType::OrganizationName, "cn:nobody");
        for (at, name) in common.iter().enumerate() {
            // rcgen keeps one of each; a second is put under the same OID by number.
            let kind = match at {
                0 => DnType::CommonName,
                _ => DnType::CustomDnType(vec![2, 5, 4, 3]),
            };
            params.distinguished_name.push(kind, *name);
        }
        params.subject_alt_names = names;
        let key = KeyPair::generate().unwrap();
        params.self_signed(&key).unwrap().der().to_vec()
    }

    fn uri(text: &str) -> SanType {
        SanType::URI(text.try_into().unwrap())
    }

    fn dns(text: &str) -> SanType {
        SanType::DnsName(text.try_into().unwrap())
    }

    fn name(common: &[&str], names: Vec<SanType>) -> Option<String> {
        PeerName::of(&certificate(common, names)).map(|name| name.to_string())
    }

    #[test]
    fn the_most_telling_name_is_taken() {
        let spiffe = "spiffe://prod/ci";
        let said = |text: &str| Some(text.to_owned());
        assert_eq!(name(&["alice"], vec![dns("a.b"), uri(spiffe)]), said("uri:spiffe://prod/ci"));
        assert_eq!(name(&["alice"], vec![dns("a.b")]), said("dns:a.b"));
        assert_eq!(name(&["älice"], vec![]), said("cn:älice"));
        let ip = SanType::IpAddress([127, 0, 0, 1].into());
        assert_eq!(name(&["alice"], vec![ip]), said("cn:alice"), "an address is no name");
        assert_eq!(name(&["uri:spiffe://prod/ci"], vec![]), said("cn:uri:spiffe://prod/ci"));
    }

    #[test]
    fn what_could_mean_several_means_none() {
        assert_eq!(name(&["alice"], vec![uri("spiffe://a/b"), uri("spiffe://a/c")]), None);
        assert_eq!(name(&["alice"], vec![dns("a.b"), dns("a.c")]), None);
        assert_eq!(name(&["alice", "bob"], vec![]), None);
        assert_eq!(name(&[], vec![]), None);
        for odd in ["", "a b", "a\nb", "a\0b", &"x".repeat(257)] {
            assert_eq!(name(&[odd], vec![]), None, "{odd:?}");
        }
    }

    #[test]
    fn clients_are_named_in_the_configuration() {
        let text = " uri:spiffe://p/ci?a=b = deployer fraud-* iris;cn:alice=admin; \
                    uri:spiffe://p/ci?a=b = viewer ;";
        let clients: Clients = text.parse().unwrap();
        let ci = PeerName("uri:spiffe://p/ci?a=b".into());
        let ci = clients.identify(&ci).unwrap();
        assert_eq!(&*ci.name, "uri:spiffe://p/ci?a=b");
        let may = |action, model: &str| ci.may(action, Some(&model.parse().unwrap()));
        assert!(may(Action::ChangeTraffic, "fraud-1") && may(Action::ChangeTraffic, "iris"));
        assert!(may(Action::ReadModels, "risk") && !may(Action::ChangeTraffic, "risk"));
        let alice = clients.identify(&PeerName("cn:alice".into())).unwrap();
        assert!(alice.may(Action::ChangeKeys, None));
        assert!(clients.identify(&PeerName("cn:bob".into())).is_none());
        assert!("".parse::<Clients>().unwrap().is_empty());
        for bad in [
            "cn:alice",
            "cn:alice =",
            "alice = admin",
            "cn: = admin",
            "cn:a b = admin",
            "cn:alice = root",
            "cn:alice = deployer [",
        ] {
            assert!(bad.parse::<Clients>().is_err(), "{bad}");
        }
        let many: String = (0..=CLIENTS_MAX).map(|at| format!("cn:{at}=viewer;")).collect();
        assert_eq!(many.parse::<Clients>().err(), Some(ClientsError::TooMany));
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
            drop(PeerName::of(&bytes));
        }

        #[test]
        fn a_changed_byte_never_panics(at in 0_usize..400, to: u8) {
            let mut bytes = certificate(&["alice"], vec![dns("a.b"), uri("spiffe://a/b")]);
            if let Some(byte) = bytes.get_mut(at) {
                *byte = to;
            }
            drop(PeerName::of(&bytes));
            bytes.truncate(at);
            drop(PeerName::of(&bytes));
        }
    }
}
