//! The enums of the contract, without the prefix of their type.

use std::fmt;
use std::str::FromStr;

use crate::error::Error;
use crate::pb;

macro_rules! words {
    ($($(#[$doc:meta])* $name:ident { $($word:ident)* })*) => {$(
        $(#[$doc])*
        ///
        /// Prints as the contract's word, and parses from it. What each word means is in the contract.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[non_exhaustive]
        pub enum $name {
            $(
                #[allow(missing_docs, reason = "the contract has them")]
                $word,
            )*
            /// A number that only a newer sidecar knows.
            Unrecognized(i32),
        }

        impl $name {
            pub(crate) fn from_number(number: i32) -> Self {
                match pb::$name::try_from(number) {
                    $(Ok(pb::$name::$word) => Self::$word,)*
                    Err(_) => Self::Unrecognized(number),
                }
            }

            pub(crate) fn number(self) -> i32 {
                match self {
                    $(Self::$word => pb::$name::$word as i32,)*
                    Self::Unrecognized(number) => number,
                }
            }

            fn prefix() -> &'static str {
                pb::$name::Unspecified.as_str_name().trim_end_matches("UNSPECIFIED")
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                match pb::$name::try_from(self.number()) {
                    Ok(word) => f.pad(word.as_str_name().trim_start_matches(Self::prefix())),
                    Err(_) => f.pad(&format!("UNRECOGNIZED_{}", self.number())),
                }
            }
        }

        impl FromStr for $name {
            type Err = Error;

            fn from_str(word: &str) -> Result<Self, Error> {
                pb::$name::from_str_name(&format!("{}{word}", Self::prefix()))
                    .map(|known| Self::from_number(known as i32))
                    .ok_or_else(|| Error::invalid(format!(concat!("{} is no ", stringify!($name)), word)))
            }
        }
    )*};
}

words! {
    /// Which of the four configurations of the feature flags is in force.
    Mode { Unspecified InternalOnly ByokOnly CreditFirst ByokFirst }

    /// Why the route of a decision was chosen.
    Reason {
        Unspecified ByokFirstOwnKey ByokFirstNoKey ByokFirstKeyFailed CreditFirstCredits
        CreditFirstExhausted ByokOnlyOwnKey ByokDisabled TierNotEligible CallerConstraint Denied
    }

    /// Why nobody's credential may pay.
    DenialReason {
        Unspecified NoKeyAndNoCredits ByokRequired TierNotEligible KeyUnusable InsufficientCredits
        HoldsInFlight RateLimited ProviderDisabled EncryptionNotConfigured
    }

    /// How a caller tightens the policy for one request; it can never relax it.
    Constraint { Unspecified Any OwnKeyOnly CreditsOnly }

    /// How the request to the provider ended. The contract says what each one charges.
    Outcome {
        Unspecified Success ClientCancelled NeverSent AuthRejected RateLimited ProviderBilling
        ProviderError Timeout Refused Unknown
    }

    /// Where a charge comes from.
    CostSource { Unspecified Reported Priced Estimated None }

    /// Where an acknowledged record is durable.
    Durability { Unspecified Database Spooled }

    /// Whether a stored key can be used, and if not, why.
    KeyState { Unspecified Usable Unverified Inactive Invalid CoolingDown Unreadable Deleted }
}

/// What to record for a provider's HTTP status.
///
/// `error_code` is the `code`, else the `type`, of the `error` object in the provider's answer.
pub fn outcome_of(status: u16, error_code: Option<&str>) -> Outcome {
    let quota = ["insufficient_quota", "billing_hard_limit_reached", "billing_not_active"];
    match (status, error_code) {
        (200..=299, _) => Outcome::Success,
        (402, _) | (400..=499, Some("billing_error")) => Outcome::ProviderBilling,
        (429, Some(code)) if quota.contains(&code) => Outcome::ProviderBilling,
        (401 | 403, _) => Outcome::AuthRejected,
        (429, _) => Outcome::RateLimited,
        (408 | 504, _) => Outcome::Timeout,
        (400..=499, _) => Outcome::Refused,
        _ => Outcome::ProviderError,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_print_and_parse_as_in_the_contract_and_every_number_survives() {
        assert_eq!(DenialReason::NoKeyAndNoCredits.to_string(), "NO_KEY_AND_NO_CREDITS");
        assert_eq!("BYOK_FIRST".parse::<Mode>().unwrap(), Mode::ByokFirst);
        assert!("MODE_BYOK_FIRST".parse::<Mode>().is_err());
        assert_eq!(Outcome::from_number(77).to_string(), "UNRECOGNIZED_77");
        for number in 0..20 {
            assert_eq!(Outcome::from_number(number).number(), number);
        }
    }

    #[test]
    fn http_statuses_have_their_outcomes() {
        for (status, code, outcome) in [
            (200, None, Outcome::Success),
            (204, Some("billing_error"), Outcome::Success),
            (401, None, Outcome::AuthRejected),
            (403, Some("insufficient_quota"), Outcome::AuthRejected),
            (403, Some("billing_error"), Outcome::ProviderBilling),
            (402, None, Outcome::ProviderBilling),
            (429, Some("insufficient_quota"), Outcome::ProviderBilling),
            (429, Some("rate_limit_exceeded"), Outcome::RateLimited),
            (408, None, Outcome::Timeout),
            (504, Some("billing_error"), Outcome::Timeout),
            (400, Some("billing_error"), Outcome::ProviderBilling),
            (400, None, Outcome::Refused),
            (302, None, Outcome::ProviderError),
            (500, None, Outcome::ProviderError),
            (0, None, Outcome::ProviderError),
        ] {
            assert_eq!(outcome_of(status, code), outcome, "{status} {code:?}");
        }
    }
}
