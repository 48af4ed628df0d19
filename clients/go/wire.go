package keyturn

// Values to messages and back: the only place that knows both. Limits are the sidecar's to check.

import (
	"math"
	"strings"
	"time"
	"unicode/utf8"

	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	keyturnv1 "github.com/keyturn/keyturn/clients/go/keyturn/v1"
)

// maxErrorMessage is how many characters of a provider's error are sent: the sidecar keeps as many.
const maxErrorMessage = 500

// Settles is what a record may settle: a *Decision, *KeyHandle, *CreditTicket, SealedHandle or SealedTicket.
type Settles interface {
	// settle puts the sealed text into the message, or says why there is nothing to record.
	settle(message *keyturnv1.RecordRequest) error
}

func (d *Decision) settle(message *keyturnv1.RecordRequest) error {
	switch {
	case d == nil:
		return invalid("Settles is nil")
	case d.Key != nil:
		return d.Key.settle(message)
	case d.Ticket != nil:
		return d.Ticket.settle(message)
	case d.Unmetered:
		return invalid("an unmetered decision has nothing to record")
	}
	return invalid("a denied decision has nothing to record")
}

func (k *KeyHandle) settle(message *keyturnv1.RecordRequest) error {
	if k == nil {
		return invalid("Settles is nil")
	}
	return k.Handle.settle(message)
}

func (t *CreditTicket) settle(message *keyturnv1.RecordRequest) error {
	if t == nil {
		return invalid("Settles is nil")
	}
	return t.Ticket.settle(message)
}

func (h SealedHandle) settle(message *keyturnv1.RecordRequest) error {
	message.Settles = &keyturnv1.RecordRequest_KeyHandle{KeyHandle: h.Text()}
	return requireText("Settles", h.Text())
}

func (t SealedTicket) settle(message *keyturnv1.RecordRequest) error {
	message.Settles = &keyturnv1.RecordRequest_CreditTicket{CreditTicket: t.Text()}
	return requireText("Settles", t.Text())
}

func encodeDecide(request DecideRequest) (*keyturnv1.DecideRequest, error) {
	message := &keyturnv1.DecideRequest{
		RequestId:   request.RequestID,
		UserId:      request.UserID,
		Provider:    request.Provider,
		Model:       request.Model,
		ServiceType: request.ServiceType,
		Constraint:  keyturnv1.Constraint(request.Constraint),
		KeyDelivery: keyturnv1.KeyDelivery_KEY_DELIVERY_INLINE,
	}
	if request.Redeem {
		message.KeyDelivery = keyturnv1.KeyDelivery_KEY_DELIVERY_REDEEM
	}
	if request.HoldTTL != 0 {
		message.HoldTtl = durationpb.New(request.HoldTTL)
	}
	for _, handle := range request.FailedKeys {
		if err := requireText("FailedKeys", handle.Text()); err != nil {
			return nil, err
		}
		message.FailedKeyHandles = append(message.FailedKeyHandles, handle.Text())
	}
	byTokens := request.InputTokens != nil || request.MaxOutputTokens != nil
	switch {
	case byTokens && request.CostMicros != nil:
		return nil, invalid("estimate with CostMicros or with tokens, not with both")
	case byTokens:
		message.Estimate = &keyturnv1.DecideRequest_Tokens{Tokens: &keyturnv1.TokenEstimate{
			InputTokens: count(request.InputTokens), MaxOutputTokens: count(request.MaxOutputTokens),
		}}
	case request.CostMicros != nil:
		message.Estimate = &keyturnv1.DecideRequest_CostMicros{CostMicros: *request.CostMicros}
	}
	return message, requireText("RequestID", request.RequestID, "UserID", request.UserID,
		"Provider", request.Provider, "Model", request.Model, "ServiceType", request.ServiceType)
}

func encodeRecord(record RecordRequest) (*keyturnv1.RecordRequest, error) {
	message := &keyturnv1.RecordRequest{
		Outcome:      keyturnv1.Outcome(record.Outcome),
		CostMicros:   record.CostMicros,
		Model:        record.Model,
		Endpoint:     record.Endpoint,
		ErrorMessage: cut(record.ErrorMessage),
	}
	if record.Settles == nil {
		return nil, invalid("Settles is nil")
	}
	if err := record.Settles.settle(message); err != nil {
		return nil, err
	}
	if record.HTTPStatus < math.MinInt32 || record.HTTPStatus > math.MaxInt32 {
		return nil, invalid("HTTPStatus %d has more than 32 bits", record.HTTPStatus)
	}
	message.HttpStatus = int32(record.HTTPStatus)
	if usage := record.Usage; usage != nil && *usage != (Usage{}) {
		message.Usage = &keyturnv1.Usage{
			InputTokens:      count(usage.InputTokens),
			OutputTokens:     count(usage.OutputTokens),
			CacheReadTokens:  count(usage.CacheReadTokens),
			CacheWriteTokens: count(usage.CacheWriteTokens),
			TotalTokens:      usage.TotalTokens,
		}
	}
	if record.ResponseTime != 0 {
		message.ResponseTime = durationpb.New(record.ResponseTime)
	}
	if record.RetryAfter != nil {
		message.RetryAfter = durationpb.New(*record.RetryAfter)
	}
	return message, requireText("Model", record.Model, "Endpoint", record.Endpoint)
}

func decodeDecision(message *keyturnv1.DecideResponse) *Decision {
	decision := &Decision{
		DecisionID: message.GetDecisionId(),
		Mode:       Mode(message.GetMode()),
		Reason:     Reason(message.GetReason()),
		Message:    message.GetMessage(),
		Degraded:   message.GetDegraded(),
		Replayed:   message.GetReplayed(),
	}
	switch route := message.GetRoute().(type) {
	case *keyturnv1.DecideResponse_Key:
		key := route.Key
		decision.Key = &KeyHandle{
			Handle:     NewSealedHandle(key.GetHandle()),
			KeyID:      key.GetKeyId(),
			Provider:   key.GetProvider(),
			Hint:       key.GetHint(),
			AuthHeader: key.GetAuth().GetHeader(),
			AuthPrefix: key.GetAuth().GetPrefix(),
			BaseURL:    key.GetBaseUrl(),
			ExpireTime: moment(key.GetExpireTime()),
		}
		if key.GetSecret() != "" {
			decision.Key.Secret = new(NewSecret(key.GetSecret()))
		}
	case *keyturnv1.DecideResponse_Ticket:
		decision.Ticket = &CreditTicket{
			Ticket:          NewSealedTicket(route.Ticket.GetTicket()),
			HoldMicros:      route.Ticket.GetHoldMicros(),
			AvailableMicros: route.Ticket.GetAvailableMicros(),
			ExpireTime:      moment(route.Ticket.GetExpireTime()),
		}
	case *keyturnv1.DecideResponse_Denial:
		decision.Denial = &Denial{
			Reason:     DenialReason(route.Denial.GetReason()),
			Retryable:  route.Denial.GetRetryable(),
			RetryAfter: route.Denial.GetRetryAfter().AsDuration(),
			Suggestion: route.Denial.GetSuggestion(),
		}
	}
	return decision
}

func decodeRecorded(message *keyturnv1.RecordResponse) *Recorded {
	return &Recorded{
		RecordID:       message.GetRecordId(),
		ChargedMicros:  message.GetChargedMicros(),
		ReleasedMicros: message.GetReleasedMicros(),
		BalanceMicros:  message.BalanceMicros,
		CostSource:     CostSource(message.GetCostSource()),
		Replayed:       message.GetReplayed(),
		Durability:     Durability(message.GetDurability()),
		KeyState:       KeyState(message.GetKeyState()),
	}
}

func decodeExplanation(message *keyturnv1.ExplainResponse) *Explanation {
	explanation := &Explanation{Decision: decodeDecision(message.GetDecision())}
	for _, step := range message.GetSteps() {
		explanation.Steps = append(explanation.Steps, ExplainStep{step.GetCheck(), step.GetResult(), step.GetDetail()})
	}
	return explanation
}

// decodeDecideResult is one item's answer; item is nil where the sidecar gave fewer answers than it was asked.
func decodeDecideResult(item *keyturnv1.BatchDecideResult) DecideResult {
	switch result := item.GetResult().(type) {
	case *keyturnv1.BatchDecideResult_Response:
		return DecideResult{Decision: decodeDecision(result.Response)}
	case *keyturnv1.BatchDecideResult_Status:
		return DecideResult{Err: errorOfItem(result.Status)}
	}
	return DecideResult{Err: unanswered()}
}

// decodeRecordResult is the same for a record.
func decodeRecordResult(item *keyturnv1.BatchRecordResult) RecordResult {
	switch result := item.GetResult().(type) {
	case *keyturnv1.BatchRecordResult_Response:
		return RecordResult{Recorded: decodeRecorded(result.Response)}
	case *keyturnv1.BatchRecordResult_Status:
		return RecordResult{Err: errorOfItem(result.Status)}
	}
	return RecordResult{Err: unanswered()}
}

func unanswered() *Error {
	return &Error{Code: codes.Internal, Message: "The sidecar gave no answer to this item of the batch."}
}

// requireText refuses what protobuf cannot hold, by name and never by content: names and texts take turns.
func requireText(pairs ...string) error {
	for i := 0; i < len(pairs); i += 2 {
		if !utf8.ValidString(pairs[i+1]) {
			return invalid("%s is not UTF-8", pairs[i])
		}
	}
	return nil
}

// cut keeps the first 500 characters of a provider's error, and replaces what is not UTF-8: a provider's garbage is
// no reason to lose the record.
func cut(text string) string {
	characters := 0
	for i := range text {
		if characters == maxErrorMessage {
			text = text[:i]
			break
		}
		characters++
	}
	return strings.ToValidUTF8(text, "\uFFFD")
}

func count(tokens *int64) int64 {
	if tokens == nil {
		return 0
	}
	return *tokens
}

func moment(stamp *timestamppb.Timestamp) time.Time {
	if stamp == nil {
		return time.Time{}
	}
	return stamp.AsTime()
}
