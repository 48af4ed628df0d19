package keyturn

import (
	"fmt"
	"strings"

	keyturnv1 "github.com/keyturn/keyturn/clients/go/keyturn/v1"
)

// The words of the contract. A number that only a newer sidecar knows is kept as it is, and prints as
// UNRECOGNIZED_<number>.

// A Mode says which of the four configurations of the feature flags is in force.
type Mode int32

const (
	ModeUnspecified  = Mode(keyturnv1.Mode_MODE_UNSPECIFIED)
	ModeInternalOnly = Mode(keyturnv1.Mode_MODE_INTERNAL_ONLY)
	ModeBYOKOnly     = Mode(keyturnv1.Mode_MODE_BYOK_ONLY)
	ModeCreditFirst  = Mode(keyturnv1.Mode_MODE_CREDIT_FIRST)
	ModeBYOKFirst    = Mode(keyturnv1.Mode_MODE_BYOK_FIRST)
)

// A Reason says why the route of a decision was chosen.
type Reason int32

const (
	ReasonUnspecified          = Reason(keyturnv1.Reason_REASON_UNSPECIFIED)
	ReasonBYOKFirstOwnKey      = Reason(keyturnv1.Reason_REASON_BYOK_FIRST_OWN_KEY)
	ReasonBYOKFirstNoKey       = Reason(keyturnv1.Reason_REASON_BYOK_FIRST_NO_KEY)
	ReasonBYOKFirstKeyFailed   = Reason(keyturnv1.Reason_REASON_BYOK_FIRST_KEY_FAILED)
	ReasonCreditFirstCredits   = Reason(keyturnv1.Reason_REASON_CREDIT_FIRST_CREDITS)
	ReasonCreditFirstExhausted = Reason(keyturnv1.Reason_REASON_CREDIT_FIRST_EXHAUSTED)
	ReasonBYOKOnlyOwnKey       = Reason(keyturnv1.Reason_REASON_BYOK_ONLY_OWN_KEY)
	ReasonBYOKDisabled         = Reason(keyturnv1.Reason_REASON_BYOK_DISABLED)
	ReasonTierNotEligible      = Reason(keyturnv1.Reason_REASON_TIER_NOT_ELIGIBLE)
	ReasonCallerConstraint     = Reason(keyturnv1.Reason_REASON_CALLER_CONSTRAINT)
	ReasonDenied               = Reason(keyturnv1.Reason_REASON_DENIED)
)

// A DenialReason says why nobody's credential may pay.
type DenialReason int32

const (
	DenialReasonUnspecified             = DenialReason(keyturnv1.DenialReason_DENIAL_REASON_UNSPECIFIED)
	DenialReasonNoKeyAndNoCredits       = DenialReason(keyturnv1.DenialReason_DENIAL_REASON_NO_KEY_AND_NO_CREDITS)
	DenialReasonBYOKRequired            = DenialReason(keyturnv1.DenialReason_DENIAL_REASON_BYOK_REQUIRED)
	DenialReasonTierNotEligible         = DenialReason(keyturnv1.DenialReason_DENIAL_REASON_TIER_NOT_ELIGIBLE)
	DenialReasonKeyUnusable             = DenialReason(keyturnv1.DenialReason_DENIAL_REASON_KEY_UNUSABLE)
	DenialReasonInsufficientCredits     = DenialReason(keyturnv1.DenialReason_DENIAL_REASON_INSUFFICIENT_CREDITS)
	DenialReasonHoldsInFlight           = DenialReason(keyturnv1.DenialReason_DENIAL_REASON_HOLDS_IN_FLIGHT)
	DenialReasonRateLimited             = DenialReason(keyturnv1.DenialReason_DENIAL_REASON_RATE_LIMITED)
	DenialReasonProviderDisabled        = DenialReason(keyturnv1.DenialReason_DENIAL_REASON_PROVIDER_DISABLED)
	DenialReasonEncryptionNotConfigured = DenialReason(keyturnv1.DenialReason_DENIAL_REASON_ENCRYPTION_NOT_CONFIGURED)
)

// A Constraint is how a caller tightens the policy for one request; it can never relax it.
type Constraint int32

const (
	ConstraintUnspecified = Constraint(keyturnv1.Constraint_CONSTRAINT_UNSPECIFIED) // the same as ANY
	ConstraintAny         = Constraint(keyturnv1.Constraint_CONSTRAINT_ANY)
	ConstraintOwnKeyOnly  = Constraint(keyturnv1.Constraint_CONSTRAINT_OWN_KEY_ONLY)
	ConstraintCreditsOnly = Constraint(keyturnv1.Constraint_CONSTRAINT_CREDITS_ONLY)
)

// An Outcome says how the request to the provider ended. The contract says what each one charges.
type Outcome int32

const (
	OutcomeUnspecified     = Outcome(keyturnv1.Outcome_OUTCOME_UNSPECIFIED)
	OutcomeSuccess         = Outcome(keyturnv1.Outcome_OUTCOME_SUCCESS)
	OutcomeClientCancelled = Outcome(keyturnv1.Outcome_OUTCOME_CLIENT_CANCELLED)
	OutcomeNeverSent       = Outcome(keyturnv1.Outcome_OUTCOME_NEVER_SENT)
	OutcomeAuthRejected    = Outcome(keyturnv1.Outcome_OUTCOME_AUTH_REJECTED)
	OutcomeRateLimited     = Outcome(keyturnv1.Outcome_OUTCOME_RATE_LIMITED)
	OutcomeProviderBilling = Outcome(keyturnv1.Outcome_OUTCOME_PROVIDER_BILLING)
	OutcomeProviderError   = Outcome(keyturnv1.Outcome_OUTCOME_PROVIDER_ERROR)
	OutcomeTimeout         = Outcome(keyturnv1.Outcome_OUTCOME_TIMEOUT)
	OutcomeRefused         = Outcome(keyturnv1.Outcome_OUTCOME_REFUSED)
	OutcomeUnknown         = Outcome(keyturnv1.Outcome_OUTCOME_UNKNOWN)
)

// A CostSource says where a charge comes from.
type CostSource int32

const (
	CostSourceUnspecified = CostSource(keyturnv1.CostSource_COST_SOURCE_UNSPECIFIED)
	CostSourceReported    = CostSource(keyturnv1.CostSource_COST_SOURCE_REPORTED)
	CostSourcePriced      = CostSource(keyturnv1.CostSource_COST_SOURCE_PRICED)
	CostSourceEstimated   = CostSource(keyturnv1.CostSource_COST_SOURCE_ESTIMATED)
	CostSourceNone        = CostSource(keyturnv1.CostSource_COST_SOURCE_NONE)
)

// A Durability says where an acknowledged record is durable.
type Durability int32

const (
	DurabilityUnspecified = Durability(keyturnv1.Durability_DURABILITY_UNSPECIFIED)
	DurabilityDatabase    = Durability(keyturnv1.Durability_DURABILITY_DATABASE)
	DurabilitySpooled     = Durability(keyturnv1.Durability_DURABILITY_SPOOLED)
)

// A KeyState says whether a stored key can be used, and if not, why.
type KeyState int32

const (
	KeyStateUnspecified = KeyState(keyturnv1.KeyState_KEY_STATE_UNSPECIFIED)
	KeyStateUsable      = KeyState(keyturnv1.KeyState_KEY_STATE_USABLE)
	KeyStateUnverified  = KeyState(keyturnv1.KeyState_KEY_STATE_UNVERIFIED)
	KeyStateInactive    = KeyState(keyturnv1.KeyState_KEY_STATE_INACTIVE)
	KeyStateInvalid     = KeyState(keyturnv1.KeyState_KEY_STATE_INVALID)
	KeyStateCoolingDown = KeyState(keyturnv1.KeyState_KEY_STATE_COOLING_DOWN)
	KeyStateUnreadable  = KeyState(keyturnv1.KeyState_KEY_STATE_UNREADABLE)
	KeyStateDeleted     = KeyState(keyturnv1.KeyState_KEY_STATE_DELETED)
)

// String returns the contract's word, e.g. BYOK_FIRST.
func (m Mode) String() string { return word(m, keyturnv1.Mode_name, "MODE_") }

// String returns the contract's word, e.g. BYOK_FIRST_OWN_KEY.
func (r Reason) String() string { return word(r, keyturnv1.Reason_name, "REASON_") }

// String returns the contract's word, e.g. RATE_LIMITED.
func (r DenialReason) String() string { return word(r, keyturnv1.DenialReason_name, "DENIAL_REASON_") }

// String returns the contract's word, e.g. CREDITS_ONLY.
func (c Constraint) String() string { return word(c, keyturnv1.Constraint_name, "CONSTRAINT_") }

// String returns the contract's word, e.g. NEVER_SENT.
func (o Outcome) String() string { return word(o, keyturnv1.Outcome_name, "OUTCOME_") }

// String returns the contract's word, e.g. PRICED.
func (c CostSource) String() string { return word(c, keyturnv1.CostSource_name, "COST_SOURCE_") }

// String returns the contract's word, e.g. DATABASE.
func (d Durability) String() string { return word(d, keyturnv1.Durability_name, "DURABILITY_") }

// String returns the contract's word, e.g. COOLING_DOWN.
func (s KeyState) String() string { return word(s, keyturnv1.KeyState_name, "KEY_STATE_") }

func word[Word ~int32](number Word, names map[int32]string, prefix string) string {
	if name, ok := names[int32(number)]; ok {
		return strings.TrimPrefix(name, prefix)
	}
	return fmt.Sprintf("UNRECOGNIZED_%d", number)
}

// OutcomeOf returns the outcome to record for a provider's HTTP status. errorCode is the code, else the type, of the
// error object in the provider's answer; empty where there is none.
func OutcomeOf(status int, errorCode string) Outcome {
	clientError := 400 <= status && status < 500
	switch {
	case 200 <= status && status < 300:
		return OutcomeSuccess
	case clientError && errorCode == "billing_error":
		return OutcomeProviderBilling
	case status == 401, status == 403:
		return OutcomeAuthRejected
	case status == 402:
		return OutcomeProviderBilling
	case status == 429:
		switch errorCode {
		case "insufficient_quota", "billing_hard_limit_reached", "billing_not_active":
			return OutcomeProviderBilling
		}
		return OutcomeRateLimited
	case status == 408, status == 504:
		return OutcomeTimeout
	case clientError:
		return OutcomeRefused
	}
	return OutcomeProviderError
}
